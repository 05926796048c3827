"""Sixteen floats side by side, as one value of compiled code: what LLVM calls `<16 x float>`.

numba compiles loops and leaves it to LLVM to find vectors in them; whether it does turns on aliasing, on a call, on a
sum. Here a vector is a type of its own: `+ - * /`, `>`, `>=` and the functions below are one instruction each with
AVX-512, two with AVX, four with NEON. Only compiled functions can hold one; memory holds flat float32 arrays, in which
vector `i` begins at `WIDTH * i`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16
"""Two registers of AVX: while one waits for a root or a quotient, the other computes. 8 lanes were 1.4 times as fast
for up to 8 frames, and slower by as much for more."""
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_MASK = ir.VectorType(ir.IntType(1), WIDTH)
_FLAGS = ("contract", "nnan", "nsz")
"""A product may go into the sum behind it without rounding; nothing is reordered."""


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(f"float32x{WIDTH}")


class _Mask(types.Type):
    def __init__(self) -> None:
        super().__init__(f"boolx{WIDTH}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _MASK)


_vector, _mask = _Vector(), _Mask()


def _define(function: Callable[..., Any], result: types.Type, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Let compiled code apply `function` to two vectors."""
    infer_global(function)(
        type("Vectors", (ConcreteTemplate,), {"cases": [signature(result, _vector, _vector)]})
    )

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    lower_builtin(function, _vector, _vector)(lower)


_define(operator.add, _vector, lambda builder, a, b: builder.fadd(a, b, flags=_FLAGS))
_define(operator.sub, _vector, lambda builder, a, b: builder.fsub(a, b, flags=_FLAGS))
_define(operator.mul, _vector, lambda builder, a, b: builder.fmul(a, b, flags=_FLAGS))
_define(operator.truediv, _vector, lambda builder, a, b: builder.fdiv(a, b, flags=_FLAGS))
_define(operator.gt, _mask, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define(operator.ge, _mask, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Pointer to vector `index` of a flat array."""
    data = context.make_array(kind)(context, builder, array).data
    first = builder.mul(index, ir.Constant(index.type, WIDTH))
    return builder.bitcast(builder.gep(data, [first]), _VECTOR.as_pointer())


@intrinsic
def load(_typing: Any, array: Any, index: Any) -> Any:
    """Vector `index` of the flat float32 `array`."""

    def emit(context: Any, builder: Any, made: Any, args: Any) -> Any:
        return builder.load(_place(context, builder, made.args[0], *args), align=4)

    return _vector(array, index), emit


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Make `value` vector `index` of the flat float32 `array`."""

    def emit(context: Any, builder: Any, made: Any, args: Any) -> Any:
        builder.store(args[2], _place(context, builder, made.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), emit


@intrinsic
def fill(_typing: Any, value: Any) -> Any:  # noqa: ARG001  # numba calls it by this name
    """The float32 `value` in all lanes."""

    def emit(_context: Any, builder: Any, _made: Any, args: Any) -> Any:
        one = builder.insert_element(
            ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0)
        )
        every = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), every)

    return _vector(types.float32), emit


@intrinsic
def choose(_typing: Any, where: Any, a: Any, b: Any) -> Any:
    """`a` in the lanes where the mask holds, else `b`."""

    def emit(_context: Any, builder: Any, _made: Any, args: Any) -> Any:
        return builder.select(*args)

    return _vector(where, a, b), emit


@intrinsic
def anywhere(_typing: Any, where: Any) -> Any:
    """Whether the mask holds in any lane."""

    def emit(_context: Any, builder: Any, _made: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(where), emit


def _from_llvm(name: str) -> Any:
    """A function of one vector that LLVM has."""

    @intrinsic
    def apply(_typing: Any, value: Any) -> Any:
        def emit(_context: Any, builder: Any, _made: Any, args: Any) -> Any:
            kind = ir.FunctionType(_VECTOR, [_VECTOR])
            function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
            return builder.call(function, args)

        return _vector(value), emit

    return apply


root = _from_llvm("sqrt")
magnitude = _from_llvm("fabs")
