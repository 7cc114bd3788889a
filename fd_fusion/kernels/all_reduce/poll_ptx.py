"""The PTX of the loop in which a thread waits for its words: text, made with no Triton."""

ONES = "0xffffffff"


def poll(rows: int, slice_words: int, units: int, tries: int = 2048) -> str:
    """PTX that looks at a thread's words of each of `rows` ranks, until all have come or after so many tries.

    Triton can only loop over all threads together, with two barriers a turn; this loop is each thread's own, and
    looks again only where words are missing. A thread has `units` times 16 bytes of a row, so an operand is 4 * units
    words. Operands: 8 rows out; 1 for each word that is late, out; the thread's own row; the addresses of its words
    in place 0; and which rank's row is not read but is its own (8: read none).
    """
    count = 4 * units
    *out, late, own, address, absent = [[f"${count * k + word}" for word in range(count)] for k in range(12)]
    text = [
        "{",
        ".reg .pred again, missing;",
        ".reg .u32 top;",
        ".reg .s32 left;",
        f".reg .u64 last<{units}>;",
        f"mov.s32 left, {tries};",
    ]
    for unit in range(units):  # the last rank's row lies where the reader's own would
        text += [f"mad.wide.s32 last{unit}, {absent[4 * unit]}, {4 * slice_words}, {address[4 * unit]};"]
    for row, to in enumerate(out):
        for word in range(count):
            text += [f"mov.u32 {to[word]}, {own[word]};"]
            if row < rows:
                text += [f"setp.ne.s32 missing, {absent[word]}, 8;"]
                text += [f"setp.ne.and.s32 missing, {absent[word]}, {row}, missing;"]
                text += [f"@missing mov.u32 {to[word]}, {ONES};"]
    text += ["look:", "setp.ne.s32 again, left, left;"]  # false
    for row in range(rows):
        for unit in range(units):
            a, b, c, d = out[row][4 * unit : 4 * unit + 4]
            place = f"{address[4 * unit]} + {4 * slice_words * row}" if row < rows - 1 else f"last{unit}"
            text += [
                f"max.u32 top, {a}, {b};",
                f"max.u32 top, top, {c};",
                f"max.u32 top, top, {d};",
                f"setp.eq.u32 missing, top, {ONES};",
                "or.pred again, again, missing;",
                f"@missing ld.volatile.global.v4.u32 {{{a}, {b}, {c}, {d}}}, [{place}];",
            ]
    text += [f"selp.u32 {word}, 1, 0, again;" for word in late]
    text += ["sub.s32 left, left, 1;", "setp.gt.and.s32 again, left, 0, again;", "@again bra look;", "}"]
    return "\n".join(text)
