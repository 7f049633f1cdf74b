"""`PABConfig`: Pyramid Attention Broadcast in diffusers' words, as sugar for a tuple of policies; its presets.

The fields carry diffusers' names (`diffusers.PyramidAttentionBroadcastConfig`), the presets the numbers of
VideoSys (github.com/NUS-HPC-AI-Lab/VideoSys, `PABConfig` of each pipeline) and of the paper's section 4.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..spelling import instead_of
from .checks import (
    check_callback,
    check_fields,
    check_integer,
    checked_blocks,
    checked_dtype,
    checked_identifiers,
    checked_window,
    is_iterable,
    is_number,
)
from .how import HIGHEST_ORDER, How, Last, Taylor
from .policy import Policy
from .when import AfterTimesteps, SkipRange
from .where import ATTENTION_ROLES, Attentions, FeedForwards

DEFAULT_TIMESTEP_SKIP_RANGE = (100, 800)


@dataclass(frozen=True)
class MLPBroadcast:
    """Broadcast feed-forward outputs after chosen timesteps, as VideoSys does.

    At a timestep in `timesteps` the feed-forward of each chosen block is computed and kept; the next
    `skip_count` steps reuse it.

    Args:
        timesteps: scheduler timesteps (scale 0 to 1000) at which to compute and keep. They have to occur
            in the generation's own timesteps, or nothing is reused.
        blocks: indices of the blocks, as they stand in the module's name (`transformer_blocks.3.ff` is 3).
            `None` means every block.
        skip_count: how many steps reuse a kept output.

    Raises:
        ValueError: if a timestep is not a number, `skip_count` is not an integer >= 1, or `blocks` holds
            something other than integers >= 0.

    Example:
        >>> PABConfig(mlp=MLPBroadcast(timesteps=(720, 640), blocks=range(5), skip_count=2)).mlp[0].blocks
        (0, 1, 2, 3, 4)
    """

    timesteps: tuple[float, ...]
    blocks: tuple[int, ...] | None = None
    skip_count: int = 1

    def __post_init__(self) -> None:
        timesteps: tuple[Any, ...] = tuple(self.timesteps) if is_iterable(self.timesteps) else (self.timesteps,)
        for timestep in timesteps:
            if not is_number(timestep):
                raise ValueError(f"mlp: timesteps must be numbers on the scheduler's scale, got {timestep!r}.")
        if not timesteps:
            raise ValueError("mlp: timesteps is empty; list the timesteps whose outputs are kept.")
        check_integer("mlp: skip_count", self.skip_count)
        object.__setattr__(self, "blocks", checked_blocks("mlp: a block index", self.blocks))
        object.__setattr__(self, "timesteps", tuple(float(timestep) for timestep in timesteps))


@dataclass(frozen=True)
class LayerBroadcast:
    """Broadcast attentions of certain names otherwise than their role says.

    Args:
        identifiers: regular expressions; it is for the attentions whose qualified names one of them matches
            (`re.search`), of whichever role.
        skip_range: `N` for them, an integer >= 1; `None` leaves them alone.
        timestep_skip_range: open window `(lo, hi)` for them, on the scheduler's scale, 0 to 1000.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> PABConfig(layers=LayerBroadcast((r"blocks.0.",), skip_range=3)).policies()[0].describe()
        'computed every 3rd step in (100, 800)'
    """

    identifiers: tuple[str, ...]
    skip_range: int | None = None
    timestep_skip_range: tuple[float, float] = DEFAULT_TIMESTEP_SKIP_RANGE

    def __post_init__(self) -> None:
        identifiers = checked_identifiers("layers: identifiers", self.identifiers)
        if not identifiers:
            raise ValueError("layers: identifiers is empty; name the attentions that it is for.")
        object.__setattr__(self, "identifiers", identifiers)
        if self.skip_range is not None:
            check_integer("layers: skip_range", self.skip_range)
        window = checked_window("layers: timestep_skip_range", self.timestep_skip_range)
        object.__setattr__(self, "timestep_skip_range", window)


@dataclass(frozen=True)
class PABConfig:
    """Which outputs to broadcast, how far, and within which timesteps.

    An attention of a role with skip range `N` and timestep window `(lo, hi)` reuses its kept output in a
    step `n` with timestep `t` if there is one, `n > 0`, `lo < t < hi` and `n mod N != 0`; otherwise it is
    computed and kept (paper, section 3.2; `diffusers/hooks/pyramid_attention_broadcast.py`).

    Roles are decided by the dataflow of the traced model: keys and values that come from another sequence
    than the queries make an attention `cross`, a sequence axis that is the video's frames makes it
    `temporal`, everything else is `spatial`. Identifiers only override that.

    Args:
        spatial_attention_block_skip_range: `N` for spatial attention, an integer >= 1. `None` leaves the
            role alone. If no range, `layers` or `mlp` is given, spatial is 2, as in diffusers.
        temporal_attention_block_skip_range: `N` for temporal attention.
        cross_attention_block_skip_range: `N` for cross-attention.
        spatial_attention_timestep_skip_range: open window `(lo, hi)` on the scheduler's scale, 0 to 1000.
        temporal_attention_timestep_skip_range: the same for temporal attention.
        cross_attention_timestep_skip_range: the same for cross-attention.
        spatial_attention_block_identifiers: regular expressions; an attention whose qualified name one of
            them matches (`re.search`) is spatial, whatever the dataflow says.
        temporal_attention_block_identifiers: the same for temporal.
        cross_attention_block_identifiers: the same for cross.
        layers: attentions to broadcast otherwise than their role says: a `LayerBroadcast`, a mapping of its fields,
            or several, of which the first that matches a name counts. Roles stay what they are.
        mlp: feed-forward outputs to broadcast: an `MLPBroadcast`, several, a mapping of its fields, or
            VideoSys' form `{720: {"block": [0, 1], "skip_count": 2}, ...}`.
        current_timestep_callback: returns the current timestep, on the windows' scale. `None` reads the
            traced model's own `timestep` input.
        forecast_order: read what is kept as a forecast of this order from the last outputs that were computed
            (`Taylor`): 0 reads the last output as it was. Each order keeps one more tensor of the output's size.
        forecast_dtype: what the differences of a forecast are kept in, a dtype or its name; `None` for the output's.

    Raises:
        ValueError: naming the field and what it must be.

    Example:
        >>> PABConfig(spatial_attention_block_skip_range=2, cross_attention_block_skip_range=6).skip_range("cross")
        6
    """

    spatial_attention_block_skip_range: int | None = None
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[float, float] = DEFAULT_TIMESTEP_SKIP_RANGE
    temporal_attention_timestep_skip_range: tuple[float, float] = DEFAULT_TIMESTEP_SKIP_RANGE
    cross_attention_timestep_skip_range: tuple[float, float] = DEFAULT_TIMESTEP_SKIP_RANGE
    spatial_attention_block_identifiers: tuple[str, ...] = ()
    temporal_attention_block_identifiers: tuple[str, ...] = ()
    cross_attention_block_identifiers: tuple[str, ...] = ()
    layers: Any = None
    mlp: Any = None
    current_timestep_callback: Callable[[], Any] | None = None
    forecast_order: int = 0
    forecast_dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _normalise_layers(self.layers))
        object.__setattr__(self, "mlp", _normalise_mlp(self.mlp))
        if not self.layers and not self.mlp and all(self.skip_range(role) is None for role in ATTENTION_ROLES):
            object.__setattr__(self, "spatial_attention_block_skip_range", 2)
        for role in ATTENTION_ROLES:
            _check_skip_range(role, self.skip_range(role))
            window_name = f"{role}_attention_timestep_skip_range"
            object.__setattr__(self, window_name, checked_window(window_name, getattr(self, window_name)))
            identifiers_name = f"{role}_attention_block_identifiers"
            object.__setattr__(
                self, identifiers_name, checked_identifiers(identifiers_name, getattr(self, identifiers_name))
            )
        check_callback(self.current_timestep_callback)
        check_integer("forecast_order", self.forecast_order, least=0, most=HIGHEST_ORDER)
        object.__setattr__(self, "forecast_dtype", checked_dtype("forecast_dtype", self.forecast_dtype))
        if self.forecast_dtype is not None and not self.forecast_order:
            raise ValueError(f"forecast_dtype={self.forecast_dtype} is for forecast_order >= 1, and it is 0.")

    def policies(self) -> tuple[Policy, ...]:
        """The config as policies; behind this nobody asks what they were.

        Example:
            >>> PABConfig(spatial_attention_block_skip_range=3, forecast_order=1).policies()[0].describe()
            'computed every 3rd step in (100, 800), forecast to order 1'
        """
        how = self._how()
        layers = [
            Policy(Attentions(names=each.identifiers), _skip_range(each.skip_range, each.timestep_skip_range), how)
            for each in self.layers
        ]
        roles = [
            Policy(
                Attentions((role,), identifiers=self.identifiers(role)),
                _skip_range(self.skip_range(role), self.window(role)),
                how,
            )
            for role in ATTENTION_ROLES
        ]
        return (*layers, *roles, *_feed_forwards(self.mlp, how))

    def _how(self) -> How:
        dtype = checked_dtype("forecast_dtype", self.forecast_dtype)
        return Taylor(self.forecast_order, dtype) if self.forecast_order else Last()

    def skip_range(self, role: str) -> int | None:
        """The skip range `N` of an attention role, or `None` where the role is left alone."""
        return getattr(self, f"{_attention_role(role)}_attention_block_skip_range")

    def window(self, role: str) -> tuple[float, float]:
        """The open timestep window `(lo, hi)` of an attention role."""
        return getattr(self, f"{_attention_role(role)}_attention_timestep_skip_range")

    def identifiers(self, role: str) -> tuple[str, ...]:
        """The regular expressions that put an attention into this role."""
        return getattr(self, f"{_attention_role(role)}_attention_block_identifiers")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the config as JSON, for `PABConfig.load`; without `current_timestep_callback`, which is code.

        A config that has one warns. `PABConfig.load(path, current_timestep_callback=...)` gives it again.

        Raises:
            OSError: if the file cannot be written.

        Example:
            >>> PABConfig.preset("latte").save("latte.json")  # doctest: +SKIP
        """
        if self.current_timestep_callback is not None:
            warnings.warn(
                f"pab_fx: current_timestep_callback is code and does not go into {path}: "
                "give it to PABConfig.load again.",
                stacklevel=2,
            )
        Path(path).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """The fields that are not the default, but for `current_timestep_callback`, which is code.

        Example:
            >>> PABConfig(cross_attention_block_skip_range=6).as_json()
            {'cross_attention_block_skip_range': 6}
        """
        fields = dataclasses.asdict(dataclasses.replace(self, current_timestep_callback=None))
        if self.forecast_dtype is not None:
            fields["forecast_dtype"] = str(self.forecast_dtype).removeprefix("torch.")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value != default[name] and value != ()}

    @classmethod
    def load(cls, path: str | PathLike[str], **overrides: Any) -> PABConfig:
        """A config from a JSON file of fields, as `save` and `pab_fx.calibrate` write it. Nothing is unpickled.

        Args:
            path: the file.
            overrides: fields to set on top of it, such as `current_timestep_callback`.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the file, if it holds something else than fields of a config.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, no text
            raise ValueError(f"{path} is no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path} must hold an object, the fields of a PABConfig by name, got {fields!r}.")
        try:
            return cls.of({**fields, **overrides})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PABConfig:
        """A published setting: "cogvideox", "latte" or "open-sora".

        Args:
            name: the preset's name.
            overrides: fields of `PABConfig` to set on top of it.

        Raises:
            ValueError: for a name that is none of the presets.

        Example:
            >>> PABConfig.preset("latte").skip_range("cross")
            6
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: {instead_of(name, PRESETS, 'the presets are')}")
        return cls.of({**PRESETS[name], **overrides})

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> PABConfig:
        """A config from a mapping of field names, refusing names that are none of them."""
        check_fields("PABConfig", fields, cls)
        return cls(**fields)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cogvideox": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 850),
    },
    "latte": {
        "spatial_attention_block_skip_range": 2,
        "temporal_attention_block_skip_range": 3,
        "cross_attention_block_skip_range": 6,
        "mlp": {"timesteps": (720, 640, 560, 480, 400), "blocks": range(5), "skip_count": 2},
    },
    "open-sora": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (450, 930),
        "temporal_attention_block_skip_range": 4,
        "temporal_attention_timestep_skip_range": (450, 930),
        "cross_attention_block_skip_range": 6,
        "cross_attention_timestep_skip_range": (450, 930),
    },
}


def _skip_range(skip_range: int | None, window: tuple[float, float]) -> SkipRange | None:
    return None if skip_range is None else SkipRange(skip_range, *window)


def _feed_forwards(entries: tuple[MLPBroadcast, ...], how: How) -> list[Policy]:
    """A policy for all blocks that have the same timesteps: of several entries, all that name a block hold for it."""
    blocks = sorted({block for entry in entries for block in entry.blocks or ()})
    alike: dict[tuple[tuple[float, int], ...], list[int]] = {}
    for block in blocks:
        alike.setdefault(_skip_counts(entries, block), []).append(block)
    policies = [Policy(FeedForwards(tuple(of)), AfterTimesteps(counts), how) for counts, of in alike.items()]
    every = _skip_counts(entries, None)
    return policies + ([Policy(FeedForwards(), AfterTimesteps(every), how)] if every else [])


def _skip_counts(entries: tuple[MLPBroadcast, ...], block: int | None) -> tuple[tuple[float, int], ...]:
    return tuple(
        (timestep, entry.skip_count)
        for entry in entries
        if entry.blocks is None or block in entry.blocks
        for timestep in entry.timesteps
    )


def _attention_role(role: str) -> str:
    if role not in ATTENTION_ROLES:
        raise ValueError(f"unknown role {role!r}; the attention roles are {', '.join(ATTENTION_ROLES)}.")
    return role


def _normalise_layers(layers: Any) -> tuple[LayerBroadcast, ...]:
    """Every accepted spelling of `layers` as a tuple of `LayerBroadcast`."""
    if layers is None or layers == ():
        return ()
    if isinstance(layers, LayerBroadcast):
        return (layers,)
    if isinstance(layers, Mapping):
        check_fields("layers", layers, LayerBroadcast)
        if "identifiers" not in layers:
            raise ValueError("layers: identifiers is missing; name the attentions that it is for.")
        return (LayerBroadcast(**layers),)
    if is_iterable(layers):
        return tuple(entry for item in layers for entry in _normalise_layers(item))
    raise ValueError(f"layers must be a LayerBroadcast, a mapping of its fields, or several, got {layers!r}.")


def _normalise_mlp(mlp: Any) -> tuple[MLPBroadcast, ...]:
    """Every accepted spelling of `mlp` as a tuple of `MLPBroadcast`."""
    if mlp is None or mlp == ():
        return ()
    if isinstance(mlp, MLPBroadcast):
        return (mlp,)
    if isinstance(mlp, Mapping):
        if mlp and all(is_number(key) for key in mlp):
            return tuple(_from_videosys(timestep, entry) for timestep, entry in mlp.items())
        check_fields("mlp", mlp, MLPBroadcast)
        if "timesteps" not in mlp:
            raise ValueError("mlp: timesteps is missing; list the timesteps whose outputs are kept.")
        return (MLPBroadcast(**mlp),)
    if is_iterable(mlp) and mlp:
        return tuple(entry for item in mlp for entry in _normalise_mlp(item))
    raise ValueError(f"mlp must be an MLPBroadcast or a mapping, got {mlp!r}.")


def _from_videosys(timestep: float, entry: Any) -> MLPBroadcast:
    if not isinstance(entry, Mapping) or not {"block", "skip_count"} >= set(entry) >= {"skip_count"}:
        raise ValueError(f"mlp: {timestep!r} must map to {{'block': [...], 'skip_count': n}}, got {entry!r}.")
    blocks = entry.get("block")
    return MLPBroadcast((timestep,), blocks, entry["skip_count"])


def _check_skip_range(role: str, value: Any) -> None:
    if value is not None:
        check_integer(f"{role}_attention_block_skip_range", value)
