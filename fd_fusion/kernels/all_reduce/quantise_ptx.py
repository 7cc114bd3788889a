"""Write the PTX with which a thread quantises its words: text, made with no Triton.

A thread has `units` times 4 words of a row, each unit in another group of 128 elements, which 16 lanes share. So each
lane is given one of these groups by its number: it divides for that one alone, and its neighbours for the others. An
operand is 4 * units words.
"""

from collections.abc import Callable


def quantising(units: int, dtype: str, interpreted: bool) -> dict[str, str | None]:
    """Return the PTX below and its operands, as constexpr arguments of a kernel; None under the interpreter."""
    if interpreted:
        return dict.fromkeys(("LARGEST", "GATHER", "STORE_SCALE", "OPERANDS_OF_WORDS", "OPERANDS_OF_SCALES"))
    return {
        "LARGEST": largest(units, dtype),
        "GATHER": gather(units),
        "STORE_SCALE": store_scale(units),
        "OPERANDS_OF_WORDS": operands(units, "=&r", "r"),
        "OPERANDS_OF_SCALES": operands(units, "=r", "l", "r", "r", "r", "r"),
    }


def operands(units: int, *kinds: str) -> str:
    """Return the constraints of operands of these kinds."""
    return ",".join(kind for kind in kinds for _ in range(4 * units))


def largest(units: int, dtype: str) -> str:
    """Return PTX: words -> the largest size in the lane's group, NaN left out, in all places; 0 if all are NaN."""
    kind, infinity = ("bf16x2", "0x7F80") if dtype == "bfloat16" else ("f16x2", "0x7C00")
    count = 4 * units
    text = [f".reg .b32 a, b, c, d, size<{units}>;", *_lane(units), "and.b32 a, lane, 16;", "setp.eq.u32 low, a, 0;"]
    for unit in range(units):
        text += [f"abs.{kind} {name}, ${count + 4 * unit + place};" for place, name in enumerate("abcd")]
        text += [f"max.{kind} a, a, b;", f"max.{kind} c, c, d;", f"max.{kind} a, a, c;"]
        text += ["and.b32 b, a, 0xFFFF;", "shr.u32 a, a, 16;"]
        for half in "ab":  # halves are in the order of their bits; NaN only where both were NaN
            text += [f"setp.gt.u32 chosen, {half}, {infinity};", f"selp.b32 {half}, 0, {half}, chosen;"]
        # Two groups are in a warp, and one instruction finds the largest in a warp.
        text += ["max.u32 a, a, b;", "selp.b32 b, a, 0, low;", "selp.b32 c, 0, a, low;"]
        text += [f"redux.sync.max.u32 {half}, {half}, 0xFFFFFFFF;" for half in "bc"]
        text += [f"selp.b32 size{unit}, b, c, low;"]
    text += _of_lane(units, "a", lambda unit: f"size{unit}")
    return _block(text + [f"mov.b32 ${number}, a;" for number in range(count)])


def gather(units: int) -> str:
    """Return PTX: what a lane has of its group, in any place -> for each word what the lane of its group has."""
    text = [".reg .b32 own;", f"mov.b32 own, ${4 * units};"]
    for unit in range(units):
        to, *others = [f"${4 * unit + place}" for place in range(4)]
        text += [f"shfl.sync.idx.b32 {to}, own, {unit}, {(32 - units) << 8 | 0x1F}, 0xFFFFFFFF;"]
        text += [f"mov.b32 {other}, {to};" for other in others]
    return _block(text)


def store_scale(units: int) -> str:
    """Return PTX: row, scales, groups, stride, mask -> store the scale of the lane's group at row + group * stride.

    Computed outside, the address would be kept in registers while words are awaited.
    """
    count = 4 * units
    row, scale, _, stride, _ = (f"${count * number}" for number in range(1, 6))
    text = [".reg .b32 group, mask;", ".reg .u64 place;", *_lane(units)]
    text += _of_lane(units, "group", lambda unit: f"${3 * count + 4 * unit}")
    text += _of_lane(units, "mask", lambda unit: f"${5 * count + 4 * unit}")
    text += [f"mad.wide.s32 place, group, {stride}, {row};", "setp.ne.s32 chosen, mask, 0;"]
    text += [f"@chosen st.global.b32 [place], {scale};"]
    return _block(text + [f"mov.b32 ${number}, 0;" for number in range(count)])


def _lane(units: int) -> list[str]:
    registers = [".reg .pred chosen, low;", ".reg .u32 lane, unit;"]
    return [*registers, "mov.u32 lane, %laneid;", f"and.b32 unit, lane, {units - 1};"]


def _of_lane(units: int, to: str, value: Callable[[int], str]) -> list[str]:
    """Choose the value of the lane's unit."""
    text = [f"mov.b32 {to}, {value(0)};"]
    for unit in range(1, units):
        text += [f"setp.eq.u32 chosen, unit, {unit};", f"selp.b32 {to}, {value(unit)}, {to}, chosen;"]
    return text


def _block(text: list[str]) -> str:
    return "\n".join(["{", *text, "}"])
