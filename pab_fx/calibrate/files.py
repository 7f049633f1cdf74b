"""The folder of a calibration: what is finished is in it, as JSON and arrays, and is not run again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Folder:
    """A folder that belongs to one calibration.

    A file is there whole or not at all, so that a run that was killed goes on with the next one. Nothing is pickled.

    Args:
        path: the folder; it is made if there is none.
        identity: what is calibrated, as plain JSON.

    Raises:
        ValueError: if the folder is of another calibration, saying in what they differ, or of something else.
        OSError: if it cannot be made.
    """

    IDENTITY = "calibration.json"

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.entries = self.path / "entries"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name a folder for the calibration.")
        own = json.loads(json.dumps(identity))
        known = self._read(self.path / self.IDENTITY)
        if known is None and self.path.exists() and any(self.path.iterdir()) and not self.entries.exists():
            raise ValueError(f"{self.path} holds something else than a calibration: name a new or an empty folder.")
        if known is None or not any(self.entries.glob("*.json")):  # nothing was finished
            self.entries.mkdir(parents=True, exist_ok=True)
            self._write(self.path / self.IDENTITY, json.dumps(own, indent=1) + "\n")
            return
        other = [name for name in {**known, **own} if known.get(name) != own.get(name)]
        if other:
            told = "; ".join(f"{name} was {_short(known.get(name))} and is {_short(own.get(name))}" for name in other)
            raise ValueError(f"{self.path} is of another calibration: {told}. Name another folder, or delete it.")

    def load(self, name: str) -> Any:
        """A finished entry, `None` if it is not finished."""
        return self._read(self.entries / f"{name}.json")

    def save(self, name: str, entry: Any) -> None:
        """Add a finished entry."""
        self._write(self.entries / f"{name}.json", json.dumps(entry) + "\n")

    def load_array(self, name: str) -> np.ndarray | None:
        """A finished array, `None` if it is not finished."""
        path = self.entries / f"{name}.npy"
        return np.load(path, allow_pickle=False) if path.exists() else None

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Add a finished array."""
        part = self.entries / f"{name}.npy.part"
        with part.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        part.replace(self.entries / f"{name}.npy")

    def _read(self, path: Path) -> Any:
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is no JSON, and nothing that a calibration wrote: delete it.") from None

    def _write(self, path: Path, text: str) -> None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
