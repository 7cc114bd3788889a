"""The PTX of the loop in which a thread waits for its words: text, made with no Triton."""


def poll(rows: int, slice_words: int, units: int, tries: int = 2048) -> str:
    """PTX that looks at a thread's words in each of `rows` rows, until all have come or after so many tries.

    Triton can only loop over all threads together, with two barriers a turn; this loop is each thread's own.
    A thread has `units` times 16 bytes of a row, so an operand is 4 * units words. Operands: 8 rows out; 1 for
    each word that is late, out; the thread's own row; the addresses of its words in row 0; and which row is not
    read but is its own (8: read none).
    """
    count = 4 * units
    *out, late, own, address, absent = [[f"${count * k + word}" for word in range(count)] for k in range(12)]
    text = [
        "{",
        f".reg .pred again, has<{8 * count}>;",
        ".reg .u32 top;",
        ".reg .s32 left;",
        f"mov.s32 left, {tries};",
    ]
    text += [f"mov.u32 {to}, {word};" for row in out for to, word in zip(row, own)]
    for unit in range(0, count, 4):
        text += [f"setp.ne.s32 again, {absent[unit]}, 8;"]
        text += [f"setp.ne.and.s32 has{count * row + unit}, {absent[unit]}, {row}, again;" for row in range(rows)]
    text += ["look:"]
    for row in range(rows):
        for unit in range(0, count, 4):
            to, place = ", ".join(out[row][unit : unit + 4]), f"[{address[unit]} + {4 * slice_words * row}]"
            text += [f"@has{count * row + unit} ld.volatile.global.v4.u32 {{{to}}}, {place};"]
    text += [f"mov.u32 top, {out[0][0]};"]
    text += [f"max.u32 top, top, {word};" for row in out[:rows] for word in row]
    text += ["sub.s32 left, left, 1;", "setp.eq.u32 again, top, 0xffffffff;"]
    text += [f"selp.u32 {word}, 1, 0, again;" for word in late]
    text += ["setp.gt.and.s32 again, left, 0, again;", "@again bra look;", "}"]
    return "\n".join(text)
