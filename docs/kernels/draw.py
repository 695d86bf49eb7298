"""Draws the loop nests of docs/kernels.md: `python docs/kernels/draw.py` writes the SVG files beside it.

A nest is a list of items, outermost first:

    Loop(text, note, items)        a frame around what it repeats
    Work(text, note)               what is done there
    Registers(rows, columns, ...)  the accumulators of a register tile, with what multiplies into them

The colour of a frame or a line says where its data lie: see PLACES. tests/test_docs.py compares the files
with what is drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LINE, PAD, INDENT = 860, 20, 8, 14
PLACES = {  # colour of the frame, of its ground
    "threads": ("#3949ab", "#eef0fb"),
    "cache": ("#00838f", "#e9f6f7"),
    "registers": ("#2e7d32", "#edf6ee"),
    "copy": ("#b26a00", "#fdf4e3"),
}
STYLE = (
    ".code{font:600 12px ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace}"
    ".note{font:12px system-ui,DejaVu Sans,sans-serif}"
)
MEANING = {
    "threads": "tasks, spread over threads",
    "cache": "walks memory that stays in a cache",
    "registers": "in registers",
    "copy": "moves data",
}


@dataclass(frozen=True)
class Work:
    text: str
    note: str = ""
    place: str = "registers"


@dataclass(frozen=True)
class Registers:
    """`rows` x `columns` accumulators; `left` is broadcast to the rows, `top` loaded for the columns."""

    rows: int
    columns: int
    left: str
    top: str
    note: str = ""


@dataclass(frozen=True)
class Loop:
    text: str
    note: str
    items: tuple
    place: str = "cache"


def task(text, note, *items):
    return Loop(text, note, items, "threads")


def loop(text, note, *items):
    return Loop(text, note, items)


def tile(text, note, *items):
    return Loop(text, note, items, "registers")


def copy(text, note=""):
    return Work(text, note, "copy")


def passes(*items):
    """Several loops one after the other."""
    return items


CONV_TILE = tile(
    "for k in block",
    "runs of NHWC floats: no im2col",
    Registers(
        14, 2, "14 pixels, one float broadcast to each row", "2 vectors of packed weights", "28 fma a step"
    ),
)
FINISH = Work(
    "y = act((sum * scale + bias) * gate + residual)", "the whole epilogue on the accumulators, one store"
)

NESTS: dict[str, tuple] = {
    "pointwise": passes(
        task(
            "task = (block of pixels, block of panels)",
            "3 M multiply-adds, some 10 us; its weights stay in L2",
            loop(
                "for tile of up to 14 pixels (AVX2: 6)",
                "of equal height: 49 = 13 + 12 + 12 + 12; input in L1",
                loop(
                    "for panel of 32 output channels (AVX2: 16)",
                    "weights packed [C][panel]: read front to back",
                    loop("for block of up to 128 input channels", "block sums are added in order", CONV_TILE),
                    FINISH,
                ),
            ),
        ),
    ),
    "stem": passes(
        task(
            "task = (image, block of output rows)",
            "conv2d of an image in planes, 7x7, stride 2",
            copy(
                "copy the input rows: planes -> pixels of 3 floats, zeros around",
                "the one time that NCHW is read",
            ),
            loop(
                "for output row, for tile of up to 14 pixels",
                "their windows overlap in the copy, in L1",
                loop(
                    "for panel of 32 output channels",
                    "[R*S*C][panel] floats",
                    loop(
                        "for filter row r: a run of S * C = 21 floats",
                        "blocks of up to 128 products",
                        CONV_TILE,
                    ),
                    FINISH,
                ),
            ),
        ),
        task(
            "task = (image, block of pooled rows)",
            "starts as soon as the rows that it reads are there",
            loop(
                "for pooled pixel",
                "windows alike share a list of up to 9 addresses",
                tile(
                    "for vector of channels",
                    "",
                    Work("m = max(x[tap]) over the taps inside the image", "NaN stays NaN"),
                ),
            ),
        ),
    ),
    "grouped": passes(
        task(
            "task = (image, block of output rows, range of channel blocks)",
            "1.5 M multiply-adds",
            loop(
                "for channel block: one vector of input channels, or one group",
                "the wider of the two",
                copy(
                    "copy the rows it reads, padded, channels of the groups transposed", "28 KB: stays in L1"
                ),
                loop(
                    "for output row, for vector of output channels, for tile of 14 pixels"
                    " (AVX2: 8; short rows 7, 3 or 1)",
                    "the last tile overlaps the one before: no masks",
                    loop(
                        "for r in 3, for channel c of the group",
                        "3 weight vectors, one for each s",
                        tile(
                            "for input column j",
                            "loaded once, not once for each tap",
                            Registers(
                                14,
                                1,
                                "column j, channel c of each group repeated",
                                "weights of s = 0, 1, 2",
                                "3 fma, into pixels j, j-1, j-2 at stride 1",
                            ),
                        ),
                    ),
                    Work("transpose back, scale, bias, residual, act, store", ""),
                ),
            ),
        ),
    ),
    "depthwise": passes(
        task(
            "task = (image, block of output rows)",
            "0.5 M multiply-adds",
            loop(
                "for block of 128 channels",
                "what a tile reads, 27 KB, fits L1",
                loop(
                    "for output row, for tile of 7 pixels",
                    "the last tile overlaps the one before",
                    loop(
                        "for vector of channels",
                        "in the order of memory",
                        tile(
                            "for r of the rows inside the image, for input column j",
                            "9 loads for 7 pixels and 3 taps, not 21",
                            Registers(
                                7,
                                1,
                                "column j, scaled and activated once",
                                "weights of s = 0, 1, 2",
                                "each channel has its own filter: nothing is summed across lanes",
                            ),
                        ),
                        Work("+ bias, act, store", ""),
                    ),
                ),
            ),
        ),
    ),
    "separable": passes(
        task(
            "task = rows of output",
            "the map between the two convolutions is never in memory",
            loop(
                "for as many rows as make 4 register tiles",
                "or all of them, where the 1x1 weights exceed L2",
                copy("depthwise rows -> scratch", "the kernel above; [pixels][C] in L2"),
                loop(
                    "for panels whose weights fit L2",
                    "the next panels, and the next depthwise rows, are fetched meanwhile",
                    loop(
                        "for tile of up to 14 pixels, for panel of 32 channels",
                        "as in pointwise",
                        loop("for block of up to 128 channels", "", CONV_TILE),
                        FINISH,
                    ),
                ),
            ),
        ),
    ),
    "squeeze_excite": passes(
        task(
            "for image (or a few): one thread takes it through all passes",
            "x comes from memory once, the second pass finds it in cache",
            loop(
                "for run of 8 pixels, for vector of channels",
                "sums of a run in float, of runs in double",
                Work("run[c] += x[pixel, c]", "then sums[c] += run[c]"),
            ),
            loop(
                "for hidden value, then for channel",
                "two layers, weights read as they lie",
                Work(
                    "hidden = relu(w1 . mean + b1);  s = sigmoid(w2 . hidden + b2)",
                    "16 partial sums on every ISA",
                ),
            ),
            loop(
                "for pixel, for vector of channels",
                "",
                Work("y = act(x * s + residual)", "and one bit an element: where act passed"),
            ),
        ),
    ),
    "winograd": passes(
        task(
            "task = up to 52 tiles of 4x4 (or 2x2, 1x4) outputs",
            "V and M stay in the task's cache",
            copy(
                "for tile: V[46 points][tile][C] = B^T d B", "only additions and subtractions for F(4x4, 3x3)"
            ),
            loop(
                "for panel of 32 output channels",
                "",
                loop(
                    "for point i of 46",
                    "filters U[panel][point][C][panel], made in double",
                    loop(
                        "for register tile of up to 14 tiles",
                        "the tiles of the image are the rows of the product",
                        loop(
                            "for block of up to 64 channels",
                            "next task's input, output and residual are fetched meanwhile",
                            tile(
                                "for c in block",
                                "",
                                Registers(
                                    14, 2, "14 tiles' V[i]", "2 vectors of U[i]", "M[46][tile][panel] = V U"
                                ),
                            ),
                        ),
                    ),
                ),
                Work(
                    "for tile: y = act(A^T M A * scale + bias + residual)",
                    "pixels outside the image are dropped",
                ),
            ),
        ),
    ),
    "dense_block": passes(
        task(
            "task = (block of rows or pixels, panels)",
            "norm -> ReLU -> 1x1 as one step",
            copy(
                "copy x[pixel, all channels so far]: relu(x * scale + shift)",
                "once for all panels; x itself is kept for the next layer",
            ),
            loop(
                "for tile of up to 14 pixels, for panel of 32 channels",
                "as in pointwise: the bottleneck of 4 * growth channels",
                loop("for block of up to 128 channels", "", CONV_TILE),
                FINISH,
            ),
        ),
        task(
            "3x3 of the bottleneck (Winograd or direct)",
            "",
            Work(
                "y -> channels [C, C + growth) of the block's one buffer",
                "pixel stride of the buffer: the concatenation is never copied",
            ),
        ),
    ),
    "linear": passes(
        task(
            "task = (images, block of panels)",
            "a row of the batch is a pixel of a 1x1 convolution",
            loop(
                "for tile of up to 14 images",
                "one image: a tile of one row",
                loop(
                    "for panel of 32 outputs",
                    "weights come from memory once: the last tasks of the step before begin to fetch them",
                    loop(
                        "for block of up to 128 inputs",
                        "block sums are added in order, whatever the batch",
                        tile(
                            "for k in block",
                            "",
                            Registers(14, 2, "x[image, k] broadcast", "2 vectors of weights"),
                        ),
                    ),
                    Work("y = act(sum + bias)", ""),
                ),
            ),
        ),
    ),
    "batch_norm": passes(
        task(
            "moments: task = (piece of up to 128 rows, up to 512 channels)",
            "pieces have fixed sizes, whoever computes them",
            loop(
                "twice over the piece, in L2: the sum, then squares about the piece's mean",
                "x comes from memory once",
                tile(
                    "for run of 8 rows, for vector of channels",
                    "",
                    Work("sum += x;  then sum += (x - centre)^2", "runs are added in double"),
                ),
            ),
        ),
        Work("mean, variance: pieces added in their order, in double, moved to one centre", "", "cache"),
        task(
            "apply: task = piece of up to 128 rows",
            "",
            loop(
                "for row, for vector of channels",
                "",
                Work(
                    "y = act((x - mean) * scale + bias + residual)",
                    "with a residual: one bit an element, where act passed",
                ),
            ),
        ),
        task(
            "backward: the same pieces, two passes",
            "reads dy, x and bits; no y",
            Work("sums of dz and dz (x - mean), in runs of 8, then in double", ""),
            Work("dx = scale * (dz - offset - (x - mean) * slope);  dresidual = dz", ""),
        ),
    ),
}


class Drawing:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.used: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, place: str) -> None:
        stroke, ground = PLACES[place]
        self.used += [place] if place not in self.used else []
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
            f' fill="{ground}" stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, text: str, kind: str, colour: str = "#212121") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" fill="{colour}">{escape(text)}</text>')

    def lines(self, x: float, y: float, right: float, text: str, note: str, colour: str) -> float:
        """The text, and its note behind it where that fits, else below; the y behind both."""
        self.text(x, y + 14, text, "code", colour)
        if not note:
            return y + LINE
        behind = x + 7.3 * len(text) + 16
        if behind + 5.8 * len(note) <= right:
            self.text(behind, y + 14, note, "note", "#616161")
            return y + LINE
        self.text(x + INDENT, y + LINE + 12, note, "note", "#616161")
        return y + 2 * LINE - 2

    def items(self, items: tuple, x: float, y: float, width: float) -> float:
        for item in items:
            y = self.item(item, x, y, width) + PAD
        return y

    def item(self, item, x: float, y: float, width: float) -> float:
        place = len(self.parts)
        right = x + width - PAD
        if isinstance(item, Registers):
            return self.registers(item, x + PAD, y, right)
        end = self.lines(x + PAD, y + 2, right, item.text, item.note, PLACES[item.place][0])
        if isinstance(item, Loop):
            end = self.items(item.items, x + INDENT, end + 4, width - INDENT - PAD)
        else:
            end += 2
        frame = Drawing()
        frame.box(x, y, width, end - y, item.place)
        self.parts[place:place] = frame.parts  # behind what it holds
        self.used += [found for found in frame.used if found not in self.used]
        return end

    def registers(self, item: Registers, x: float, y: float, right: float) -> float:
        cell, gap = 11, 2
        lanes = 4 if item.columns > 1 else 6  # drawn; a vector has 8 or 16
        left = x + 4
        top = y + 18
        self.text(left, y + 12, item.top, "note", "#616161")
        for row in range(item.rows):
            for column in range(item.columns):
                for lane in range(lanes):
                    at = left + column * (lanes * cell + 6) + lane * cell
                    self.parts.append(
                        f'<rect x="{at:g}" y="{top + row * (cell + gap) // 2:g}" width="{cell - 1}"'
                        ' height="5" fill="#81c784" stroke="none"/>'
                    )
        height = item.rows * (cell + gap) // 2
        beside = left + item.columns * (lanes * cell + 6) + 12
        words = (
            f"{item.rows} x {item.columns} accumulators (AVX-512)"
            if item.rows == 14
            else f"{item.rows} x {item.columns} accumulators"
        )
        notes = [words, item.left, *([item.note] if item.note else [])]
        for number, note in enumerate(notes):
            self.text(beside, top + 12 + number * 16, note, "note", "#2e7d32" if number == 0 else "#616161")
        return top + max(height, 16 * len(notes)) + 2


def draw(name: str) -> str:
    drawing = Drawing()
    end = drawing.items(NESTS[name], 8, 8, WIDTH - 16)
    x = 12.0
    for place in (place for place in PLACES if place in drawing.used):
        drawing.box(x, end + 4, 12, 12, place)
        drawing.text(x + 18, end + 14, MEANING[place], "note", "#424242")
        x += 30 + 6.2 * len(MEANING[place])
    height = end + 26
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}"'
        f' height="{height:g}">\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(drawing.parts) + "\n</svg>\n"


def main() -> None:
    for name in NESTS:
        Path(__file__).with_name(f"{name}.svg").write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
