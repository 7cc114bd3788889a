"""Write the PTX of the loop in which a thread polls for its words: text, made with no Triton."""

SENTINEL = "0xffffffff"


def poll(rows: int, place_words: int, units: int, tries: int = 2048) -> str:
    """Return PTX that polls for a thread's words of each of `rows` ranks, until all have come or after `tries` tries.

    Triton can only loop over all threads together, with two barriers a turn; in this loop each thread runs by itself,
    and loads again only words that are missing. The places of a slot lie `place_words` apart. A thread has `units`
    times 16 bytes of a row, so an operand is 4 * units words. Operands: 8 rows out; 1 for each missing word, out; the
    thread's own row; the addresses of its words in place 0; and the rank whose row is not loaded but is the thread's
    own (8: load none).
    """
    count = 4 * units
    *out, missing_words, own_words, address, skipped_rank = [
        [f"${count * operand + word}" for word in range(count)] for operand in range(12)
    ]
    text = [
        "{",
        ".reg .pred again, missing;",
        ".reg .u32 largest;",
        ".reg .s32 tries_left;",
        f".reg .u64 last<{units}>;",
        f"mov.s32 tries_left, {tries};",
    ]
    for unit in range(units):  # the last rank's row is in the place where the reader's own would be
        offset = f"{skipped_rank[4 * unit]}, {4 * place_words}"
        text += [f"mad.wide.s32 last{unit}, {offset}, {address[4 * unit]};"]
    for row, words in enumerate(out):
        for word in range(count):
            text += [f"mov.u32 {words[word]}, {own_words[word]};"]
            if row < rows:
                text += [f"setp.ne.s32 missing, {skipped_rank[word]}, 8;"]
                text += [f"setp.ne.and.s32 missing, {skipped_rank[word]}, {row}, missing;"]
                text += [f"@missing mov.u32 {words[word]}, {SENTINEL};"]
    text += ["poll:", "setp.ne.s32 again, tries_left, tries_left;"]  # false
    for row in range(rows):
        for unit in range(units):
            a, b, c, d = out[row][4 * unit : 4 * unit + 4]
            place = f"{address[4 * unit]} + {4 * place_words * row}" if row < rows - 1 else f"last{unit}"
            text += [
                f"max.u32 largest, {a}, {b};",
                f"max.u32 largest, largest, {c};",
                f"max.u32 largest, largest, {d};",
                f"setp.eq.u32 missing, largest, {SENTINEL};",
                "or.pred again, again, missing;",
                f"@missing ld.volatile.global.v4.u32 {{{a}, {b}, {c}, {d}}}, [{place}];",
            ]
    text += [f"selp.u32 {word}, 1, 0, again;" for word in missing_words]
    text += ["sub.s32 tries_left, tries_left, 1;", "setp.gt.and.s32 again, tries_left, 0, again;", "@again bra poll;"]
    return "\n".join([*text, "}"])
