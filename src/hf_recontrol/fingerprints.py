"""What identifies a model or a function: hashes that a new process, another folder or another line number keeps."""

import dis
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONSTRUCTORS = ("__init__", "__new__", "__post_init__", "__setstate__")


def sha256_of(parts: Iterable[str]) -> str:
    """Of texts, with a line's end after each."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def weight_samples(model: PreTrainedModel) -> Iterator[str]:
    """64 values of each weight: enough to tell two models of one name apart, and quick with any."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype} {sample.view(torch.uint8).tolist()}"


def code_sha256(function: Callable[..., Any]) -> str:
    """Of what a callable does, as far as it can be seen.

    Seen are its bytecode, names and constants, its defaults, the arguments of a partial, and what it reads: functions
    of its own module or closure, methods of its own object, and constants (numbers, texts, tuples and frozensets of
    them) in its closure, module or object. What any call sets itself (`nonlocal`, `global`, `self.calls += 1`) is state
    and left out.

    Not seen are lists, dicts and other objects, and what other modules, files and servers hold: a word list in a
    list may change unnoticed, one in a tuple may not. Another Python version compiles to another hash.
    """
    return sha256_of([json.dumps(_Reader().function(function), sort_keys=True)])


class _Reader:
    """Describes functions and values in plain JSON; a function that it meets again only by when it met it first."""

    def __init__(self) -> None:
        self.met: dict[int, int] = {}
        self.kept: list[object] = []  # an id is only good while its owner lives

    def function(self, function: Any) -> Any:
        if id(function) in self.met:
            return ["again", self.met[id(function)]]
        self.met[id(function)] = len(self.met)
        self.kept.append(function)
        if isinstance(function, functools.partial):
            return ["partial", self.function(function.func), self.value(function.args), self.mapping(function.keywords)]
        if isinstance(function, MethodType):
            return ["method", self.function(function.__func__), self.object(function.__self__, function.__func__)]
        if isinstance(function, FunctionType):
            return self.python_function(function)
        if isinstance(function, (type, BuiltinFunctionType)):
            return ["named", function.__qualname__]
        if hasattr(function, "__wrapped__"):  # as functools.lru_cache makes them
            return ["wrapped", self.function(function.__wrapped__)]
        call = inspect.getattr_static(type(function), "__call__", None)
        return [type(function).__name__, self.function(call), self.object(function, call)]

    def python_function(self, function: FunctionType) -> Any:
        code = function.__code__
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        contents = {name: _content(cells[name]) for name in cells.keys() - _stored(code, "STORE_DEREF")}
        found = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
        for name in _stored_globals(function):
            found.pop(name, None)
        return {
            "code": self.code(code),
            "defaults": self.value(function.__defaults__),
            "keyword_defaults": self.mapping(function.__kwdefaults__ or {}),
            "closure": self.read(contents, lambda value: isinstance(value, FunctionType | functools.partial)),
            "globals": self.read(found, lambda value: _is_function_of(value, function.__module__)),
        }

    def object(self, owner: object, call: Any) -> Any:
        """Of a method's self: what its attributes hold, and the methods that the call names."""
        kind = owner if isinstance(owner, type) else type(owner)
        state = set().union(*(_stored(method.__code__, "STORE_ATTR") for method in _methods(kind, CONSTRUCTORS)))
        attributes = {name: value for name, value in getattr(owner, "__dict__", {}).items() if name not in state}
        methods = {method.__name__: method for method in _methods(kind)}
        named, waiting = {}, [call]
        while waiting:  # the methods that it names, and those that they name
            for name in _names(getattr(waiting.pop(), "__code__", None)):
                if name in methods and name not in named:
                    named[name] = methods[name]
                    waiting.append(methods[name])
        return [self.read(attributes), {name: self.function(method) for name, method in sorted(named.items())}]

    def read(self, values: Mapping[str, Any], followed: Callable[[Any], bool] = lambda value: False) -> Any:
        """The constants among the values, and those functions that are `followed`."""
        found: dict[str, Any] = {}
        for name, value in sorted(values.items()):
            if followed(value):
                found[name] = self.function(value)
            elif _is_constant(value):
                found[name] = self.value(value)
        return found

    def mapping(self, values: Mapping[str, Any]) -> Any:
        return {name: self.value(value) for name, value in values.items()}

    def value(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value if value is None or type(value) in (bool, int, str) else [type(value).__name__, str(value)]
        if isinstance(value, float | complex | bytes) or value is Ellipsis:
            return [type(value).__name__, repr(value)]
        if isinstance(value, tuple):
            return ["tuple", *map(self.value, value)]
        if isinstance(value, frozenset):  # its order depends on PYTHONHASHSEED
            return ["frozenset", *sorted((self.value(item) for item in value), key=json.dumps)]
        if isinstance(value, CodeType):
            return self.code(value)
        if isinstance(value, FunctionType | functools.partial | MethodType):
            return self.function(value)
        return ["unseen", type(value).__qualname__]

    def code(self, code: CodeType) -> Any:
        return {
            "bytecode": code.co_code.hex(),
            "handlers": code.co_exceptiontable.hex(),
            "names": [*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars],
            "arguments": [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
            "constants": [self.value(constant) for constant in code.co_consts],
        }


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """The code, and that of the functions and comprehensions inside."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _names(code: CodeType | None) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _stored(code: CodeType, operation: str) -> set[str]:
    return {i.argval for inner in _codes(code) for i in dis.get_instructions(inner) if i.opname == operation}


def _stored_globals(function: FunctionType) -> set[str]:
    """What any function of the module sets by `global`."""
    module = [value for value in function.__globals__.values() if _is_function_of(value, function.__module__)]
    return set().union(*(_stored(other.__code__, "STORE_GLOBAL") for other in [function, *module]))


def _methods(kind: type, but: tuple[str, ...] = ()) -> list[FunctionType]:
    """Of the class and those of its own module that it inherits from; the nearest of a name."""
    found: dict[str, FunctionType] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ == kind.__module__:
            found |= {name: value for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return [value for name, value in found.items() if name not in but]


def _is_function_of(value: object, module: str) -> bool:
    return isinstance(value, FunctionType) and value.__module__ == module


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return inspect.Signature.empty
