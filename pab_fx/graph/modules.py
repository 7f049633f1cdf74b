"""Which module call emitted a node: one reading of `meta["nn_module_stack"]` for every tracer.

Dynamo keys the stack by `id(module)` and gives source expressions as paths, `torch.export` and
`symbolic_trace` give qualified names; all of them append `@k` to the key of a repeated call. Here each
becomes a `ModuleCall` with the qualified name and, where it can be reached, the module itself.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx, nn


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Args:
        key: tells this call from every other in the graph.
        module_id: the same for all calls of one module.
        name: qualified name in the outermost model; relative where that is not known.
        cls: the module's class, `None` where it cannot be imported.
        module: the module itself, `None` where only the graph is known.
    """

    key: str
    module_id: str
    name: str
    cls: type | None
    module: nn.Module | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ModuleNames:
    """Qualified names for the modules of a traced frame.

    Args:
        by_id: `id(module)` to (qualified name, module), for the outermost model.
        enclosing: the modules around the traced frame, outermost first, the frame's own module last.
        ends: whether the graph runs to the end of that module's call, not to a graph break.
        begins: whether it begins where that call does.
        aliases: for a module that has several names, each further one to the first.
    """

    by_id: Mapping[int, tuple[str, nn.Module]] = field(default_factory=dict)
    enclosing: tuple[nn.Module, ...] = ()
    ends: bool = True
    begins: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, enclosing: Iterable[nn.Module] = (), ends: bool = True, begins: bool = True
    ) -> ModuleNames:
        """The names of `model`'s modules, for a frame that runs inside of `enclosing` (outermost first)."""
        by_id = {id(module): (name, module) for name, module in model.named_modules()}
        around = tuple(module for module in enclosing if id(module) in by_id)
        return cls(by_id, around, ends, begins, _aliases(model))

    @classmethod
    def of_graph(cls, gm: fx.GraphModule) -> ModuleNames:
        """The names that a graph tells by itself: modules with the same parameters are one module."""
        return cls(aliases=_aliases(gm))

    @property
    def model(self) -> nn.Module | None:
        """The outermost model, `None` where it is not known."""
        return next((module for name, module in self.by_id.values() if not name), None)

    @property
    def frame(self) -> str:
        """Qualified name of the traced frame's module, "" for the outermost model's own frame."""
        return self.by_id[id(self.enclosing[-1])][0] if self.enclosing else ""

    def siblings(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """What a part of the traced frame's module is called within it, and in the others of that module's class.

        Those may run the frame's code too. `None` where the frame is the outermost model's own; "" for the
        frame's module itself.

        Example:
            >>> block = nn.Linear(1, 1)
            >>> model = nn.Sequential(block, nn.Linear(1, 1))
            >>> ModuleNames.of(model, [model, block]).siblings("0.attn")
            ('attn', ('1.attn',))
        """
        if len(self.enclosing) < 2:
            return None, ()
        own = self.enclosing[-1]
        prefix = self.by_id[id(own)][0]
        if name != prefix and not name.startswith((prefix + ".", prefix + ":")):
            return None, ()
        relative = name.removeprefix(prefix).removeprefix(".")
        others = [n for n, module in self.by_id.values() if type(module) is type(own) and module is not own]
        return relative, tuple(joined(other, relative) for other in others)

    def yields_output_of(self, call: ModuleCall) -> bool:
        """Whether the graph computes what a call returns.

        It does unless the call began before the traced frame did; then only if the frame is the module's
        own and the graph runs to its end.
        """
        if call.module is None or all(call.module is not module for module in self.enclosing):
            return True
        return self.ends and call.module is self.enclosing[-1]

    def stack(self, node: fx.Node) -> tuple[ModuleCall, ...]:
        """The module calls that `node` was emitted in, outermost first."""
        outer = [
            ModuleCall(f"frame {id(module)}", str(id(module)), self.by_id[id(module)][0], type(module), module)
            for module in self.enclosing
        ]
        entries = (node.meta.get("nn_module_stack") or {}).items()
        return (*outer, *(self._call(str(key), path, cls) for key, (path, cls) in entries))

    def _call(self, key: str, path: str, cls: type | str) -> ModuleCall:
        module_id = key.split("@")[0]
        name, module = qualified_name(path), None
        if module_id.isdigit() and int(module_id) in self.by_id:
            name, module = self.by_id[int(module_id)]
        elif not module_id.isdigit():
            module_id = self.aliases.get(name, name)
            module = next((m for n, m in self.by_id.values() if n == module_id), None)
        if module is not None:
            cls = type(module)
        return ModuleCall(f"{key} {path}", module_id, name, imported(cls), module)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of the modules to their first: `torch.export` copies a module that has two names."""
    first: dict[tuple[int, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, module in all_names(model):
        parameters = tuple(id(parameter) for parameter in module.parameters(recurse=True))
        key = (len(list(module.children())), *parameters)
        if parameters:
            aliases[name] = first.setdefault(key, name)
    return aliases


def all_names(module: nn.Module, name: str = "", around: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every name of every module; `named_modules(remove_duplicate=False)` has no end where a part holds its whole."""
    yield name, module
    for key, child in module._modules.items():
        if child is not None and all(child is not outer for outer in (module, *around)):
            yield from all_names(child, joined(name, key), (module, *around))


def joined(prefix: str, relative: str) -> str:
    """The qualified name of a part of a module; of the module itself for an empty `relative`.

    Example:
        >>> joined("blocks.0", "attn"), joined("blocks.0", ":sdpa"), joined("blocks.0", "")
        ('blocks.0.attn', 'blocks.0:sdpa', 'blocks.0')
    """
    return prefix + relative if not prefix or not relative or relative.startswith(":") else f"{prefix}.{relative}"


def qualified_name(path: str) -> str:
    """A stack path as a qualified name.

    Example:
        >>> qualified_name("L['self'].__dict__['_modules']['transformer_blocks'].0.attn1")
        'transformer_blocks.0.attn1'
        >>> qualified_name("blocks.0.attn")
        'blocks.0.attn'
    """
    path = re.sub(r"^[LG]\['\w+'\]", "", path)
    path = re.sub(r"\.forward\.__self__|\.__dict__\['_modules'\]|\._modules", "", path)
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    return path.strip(".")


def imported(cls: type | str) -> type | None:
    """A class from its dotted path, as `torch.export` writes it; a class is returned as it is."""
    if not isinstance(cls, str):
        return cls
    module, _, name = cls.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def call_sites(graph: fx.Graph, names: ModuleNames) -> dict[ModuleCall, list[fx.Node]]:
    """Every module call of the graph with the nodes it emitted, in graph order.

    Inputs, parameters (`get_attr`) and the output belong to no call.
    """
    sites: dict[ModuleCall, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        for call in names.stack(node):
            sites.setdefault(call, []).append(node)
    return sites


def entries_around(name: str) -> list[str]:
    """The entries of lists that a module is, or is part of: those of its qualified name that end in a number.

    Example:
        >>> entries_around("encoder.layers.0.1.norm")
        ['encoder.layers.0', 'encoder.layers.0.1']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def list_of(entry: str) -> str:
    """The qualified name of the list that an entry is in.

    Example:
        >>> list_of("encoder.layers.0")
        'encoder.layers'
    """
    return entry.rpartition(".")[0]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that are worth compiling once for all: those of a class that occurs several times.

    What diffusers lists for a class (`_repeated_blocks`, as in `compile_repeated_blocks`), else the entries of the
    outermost `nn.ModuleList`s.

    Raises:
        ValueError: if there are none.
    """
    listed = getattr(model, "_repeated_blocks", None)
    if listed:
        blocks = [module for module in model.modules() if type(module).__name__ in listed]
    else:
        lists = [module for module in model.children() if isinstance(module, nn.ModuleList)]
        blocks = [block for each in lists for block in _entries(each)]
        classes = Counter(map(type, blocks))
        blocks = [block for block in blocks if classes[type(block)] > 1]
    if not blocks:
        raise ValueError(f"regional=True: {type(model).__name__} has no repeated blocks; leave it out.")
    return blocks


def _entries(container: nn.Module) -> list[nn.Module]:
    """The modules in a container that are called, also where it holds containers, which are not."""
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return [container]
    return [entry for child in container.children() for entry in _entries(child)]


def argument_of(node: fx.Node, parameters: Sequence[str]) -> str | None:
    """Name of the model's argument that an input of its graph is, or is a part of; `None` where that is not known.

    Dynamo names inputs `L_args_0_`, `L_kwargs_text_`, `L_text_`, parts of tuples `L_text_0_`; `torch.export` `text`.
    """
    source = str(node.target).lower()
    positional = re.match(r"l_args_(\d+)_", source)
    if positional:
        index = int(positional[1])
        return parameters[index] if index < len(parameters) else None
    name = re.sub(r"^l_(kwargs_)?", "", source)
    known = [each for each in parameters if f"{name}_".startswith(f"{each.lower()}_")]
    return max(known, key=len) if known else None
