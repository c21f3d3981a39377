"""The table to meet: every row's goal, the bound that no method can pass, and where its number stands in results/.

`scripts/speed_page.py` reads it for docs/speed.md, `run.py` for what there is to run. A goal that cannot be met stays:
the page then says how far away it is, and how far the bound is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

SMALL, LARGE = "512/32000", "896/151936"
TIME, STEP, PEAK = "cpu seconds, ratio", "cpu seconds a step, ratio", "peak MiB, ratio"
ONE_PASS, FULL = "holdfast: CE + masked KL, one pass", "holdfast: CE + full KL, one pass"
PLAIN, BOUND, CE = "autograd: CE + masked KL", "three products, whole", "holdfast: CE"
LIGER, TORCHTUNE = "Liger chunked JSD: CE + full KL", "torchtune chunked: CE + full KL"
TRL, TORCH_CE = "TRL ChunkedDivergence: full KL", "torch F.linear_cross_entropy: CE"
SFT, LIVE = "plain SFT", "masked KL, live base"
SHARED, WHOLE = "masked KL, lower layers shared", "masked KL, lower layers run twice"
STEP_SHAPES = ("512/8192", "512/32000")
BUFFERS_MIB = 2 * 128 * 151_936 * 4 / 2**20  # two of 128 rows, the default on a CPU


@dataclass(frozen=True)
class Measure:
    """One number of a results file; empty `dtype`, `shape`, `tokens` and `peer` fit any.

    Attributes:
        variant: as the file has it.
        metric: likewise.
        peer: what it is divided by.
        at_most: the goal; None: reported alone.
        bound: a variant whose ratio to the same peer no method can pass, or a number.
        bound_mib: the same for a ratio of memory, before it is divided by the peer's.
        rival: a variant whose number is shown beside it.
        of: what is measured, where the sizes do not say it.
    """

    variant: str
    metric: str
    peer: str = ""
    dtype: str = "float32"
    shape: str = ""
    tokens: str = ""
    at_most: float | None = None
    bound: str | float | None = None
    bound_mib: float | None = None
    rival: str = ""
    of: str = ""

    def fits(self, row: Mapping[str, str]) -> bool:
        """Say whether a row of the file is this number; rows from before there were shapes fit any."""
        wanted = {"dtype": self.dtype, "tokens": self.tokens, "peer": self.peer}
        exact = row["variant"] == self.variant and row["metric"] == self.metric
        known = all(not value or row[column] == value for column, value in wanted.items())
        return exact and known and (not self.shape or row["shape"] in ("", self.shape))

    def found(self, rows: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
        """Return its row, if it was measured: one with its very shape before one without."""
        return max((row for row in rows if self.fits(row)), key=lambda row: row["shape"], default=None)

    @property
    def sizes(self) -> str:
        """Its sizes in words."""
        shape = "hidden {}, vocabulary {:,}".format(*map(int, self.shape.split("/"))) if self.shape else ""
        tokens = f"{int(self.tokens):,} tokens" if self.tokens and self.shape else ""
        dtype = self.dtype if self.shape else ""
        return ", ".join(words for words in (self.of, shape, tokens, dtype) if words)


@dataclass(frozen=True)
class Row:
    """A row of the table: what is asked, and its numbers."""

    name: str
    asks: str
    script: str
    measures: tuple[Measure, ...]
    only: str = ""
    note: str = ""

    @property
    def command(self) -> str:
        """What measures it."""
        return f"python benchmarks/{self.script}.py" + (f" --only {self.only}" if self.only else "")


def timed(
    variant: str, peer: str, goals: Sequence[tuple[str, str, str, float | None]], bound: str | float | None
) -> Iterator[Measure]:
    """One variant against one peer at several sizes: shape, tokens, dtype, goal."""
    for shape, tokens, dtype, at_most in goals:
        yield Measure(variant, TIME, peer, dtype, shape, tokens, at_most, bound)


def sizes(small: float | None, large: float | None, dtypes: Sequence[str] = ("float32", "bfloat16")):
    """The two shapes of the table, with their goals."""
    places = [(SMALL, "1024", small), (LARGE, "2048", large)]
    return [(shape, tokens, dtype, goal) for dtype, (shape, tokens, goal) in product(dtypes, places)]


def flat() -> Iterator[Measure]:
    """The projection of 10 M and 100 M numbers."""
    start = "flat projection k = 8: "
    peers = (
        ("loop over tensors, dot and axpy", "loop", 0.40),
        ("an AdamW step", "AdamW", 3.0),
        ("a fused AdamW step", "fused AdamW", 3.0),
    )
    for tokens, (mine, of), (peer, against, goal) in product(
        ("10000000", "100000000"), (("holdfast, flat", "one vector"), ("holdfast, in a step", "in a step")), peers
    ):
        words = f"{int(tokens) // 1_000_000} M numbers, {of}, / {against}"
        bound = f"{start}the basis read twice"
        yield Measure(start + mine, TIME, start + peer, "float32", "", tokens, goal, bound, of=words)


def of_steps(variant: str, peer: str, goal: float | None, words: str = "", bound: float | None = None):
    """One variant of a training step, at both vocabularies."""
    for shape in STEP_SHAPES:
        yield Measure(variant, TIME, peer, shape=shape, tokens="1024", at_most=goal, bound=bound, of=words)


F32 = ("float32",)
AT_2048 = {"shape": LARGE, "tokens": "2048"}
ROWS = (
    Row("B1", "CE + masked KL in one pass / autograd on whole logits", "divergence",
        tuple(timed(ONE_PASS, PLAIN, sizes(0.50, 0.65, F32), BOUND)), "float32",
        "Bound: the three matrix products alone, on whole logits."),
    Row("B2", "the same in bfloat16", "divergence",
        tuple(timed(ONE_PASS, PLAIN, sizes(0.40, 0.40, ("bfloat16",)), BOUND)), "bfloat16",
        "Bound as in B1, multiplied in bfloat16; without instructions for that a CPU is so slow that ours, which then "
        "widens the head tile by tile, may be below it."),
    Row("B3", "peak memory / autograd's, and its growth from 1,024 tokens", "divergence",
        (Measure(ONE_PASS, PEAK, PLAIN, **AT_2048, at_most=0.02, bound_mib=BUFFERS_MIB),
         Measure(ONE_PASS, "growth of peak, of tokens x hidden", **AT_2048 | {"tokens": "16384"}, at_most=1.05,
                 bound=1.0, of="growth / tokens × hidden × 4 bytes")), "memory",
        "Bound: two buffers of a chunk; for the growth, the gradient on the hidden states."),
    Row("B4", "one pass / three products on whole logits", "divergence",
        tuple(timed(ONE_PASS, BOUND, sizes(1.15, 1.15), 1.0)), "time"),
    Row("B5", "one pass / our cross-entropy alone", "divergence",
        tuple(timed(ONE_PASS, CE, sizes(1.6, 1.6), 1.5)), "time", "Bound: three products against two."),
    Row("B6", "CE + full KL in one pass / Liger's chunked JSD at beta = 0; TRL's chunked KL beside it", "divergence",
        (*timed(FULL, LIGER, sizes(0.75, 0.75, F32), BOUND),
         Measure(FULL, PEAK, LIGER, **AT_2048, at_most=0.15, of="memory"),
         Measure("holdfast: full KL", TIME, TRL, shape=SMALL, tokens="1024", of="KL alone, / TRL"),
         Measure("holdfast: full KL", TIME, TRL, shape=LARGE, tokens="128", of="KL alone, / TRL"),
         Measure("holdfast: full KL", PEAK, TRL, **AT_2048, of="KL alone, / TRL, memory")), "float32",
        "Liger is asked for no compilation; TRL's takes five products where ours takes three, and no goal was set."),
    Row("B7", "CE + full KL in one pass / torchtune's chunked losses", "divergence",
        (*timed(FULL, TORCHTUNE, sizes(0.65, 0.65, F32), BOUND),
         Measure(FULL, PEAK, TORCHTUNE, **AT_2048, at_most=0.10, of="memory")), "float32"),
    Row("B8", "our cross-entropy / torch's F.linear_cross_entropy", "divergence",
        (*timed(CE, TORCH_CE, [(SMALL, "512", "float32", 0.5)], None),
         Measure(CE, PEAK, TORCH_CE, shape=SMALL, tokens="512", at_most=0.5, of="memory")), "512",
        "Torch takes few rows at a time, for less memory and more time; ours as many as 64 MiB hold on a CPU."),
    Row("B9", "masked KL with the base cached / our cross-entropy", "divergence",
        tuple(timed("holdfast: masked KL, base cached", CE, sizes(1.10, 1.10), 1.0)), "time",
        "Bound: two products each."),
    Row("B9, file", "the same with its file read", "cached_kl",
        (Measure("0.5B: masked KL, cached statistics", TIME, "0.5B: cross-entropy", at_most=1.10, bound=1.0,
                 of="hidden 896, vocabulary 32,000, 256 tokens, float32"),), "0.5B"),
    Row("B10", "a training step with masked KL, the base run / plain LoRA SFT", "step",
        (*of_steps(LIVE, SFT, 1.45), Measure(f"checkpointing: {LIVE}", TIME, f"checkpointing: {SFT}", at_most=1.35,
                                             shape=STEP_SHAPES[0], tokens="1024", of="checkpointing"),
         *of_steps(LIVE, f"{LIVE}, two passes over the head", None, "/ two passes over the head")), "B10",
        "A base forward is half of what a frozen model's step computes, or a third with checkpointing."),
    Row("B11", "the same with the base cached, the disk read / plain LoRA SFT", "step",
        tuple(of_steps("masked KL, cached", SFT, 1.05, bound=1.0)), "B11"),
    Row("B12", "LoRA on the upper half, the lower layers run once / its own plain SFT, / run twice", "step",
        tuple(Measure(f"upper half: {SHARED}", TIME, f"upper half: {peer}", at_most=goal, shape=STEP_SHAPES[0],
                      tokens="1024", of=words)
              for peer, goal, words in ((SFT, 1.42, "/ plain"), (WHOLE, 0.90, "/ run twice"))), "B12"),
    Row("B13", "projection off k = 8 vectors / a loop over tensors, / an AdamW step, / a fused one", "projection",
        tuple(flat()), "flat",
        "The goal names no form of AdamW: torch's default is not fused, that of transformers is. Bound: "
        "the basis read twice, which no exact projection can do without. *In a step* it also measures what it takes "
        "off, which the loops leave out."),
    Row("B14", "collecting a diagonal Fisher / forward and backward of all weights, / per-sample gradients", "fisher",
        tuple(Measure("diagonal", TIME, peer, at_most=goal, bound="forward and backward, activations alone",
                      of=f"31 M parameters, {words}")
              for peer, words, goal in (("forward and backward, all weights", "/ plain", 1.15),
                                        ("per-sample gradients, torch.func", "/ vmap", 0.3))),
        note="Bound: forward and backward of activations alone."),
    Row("B15", "error of the masked KL's gradient at KL = 1e-3 in bfloat16", "divergence",
        (Measure("holdfast: masked KL", "gradient error", dtype="bfloat16", shape=SMALL, tokens="64", at_most=0.03,
                 rival="autograd: masked KL"),), "accuracy", "In brackets: multiplied in bfloat16, then widened."),
    Row("B16", "errors at a confident target, gap 20, float32", "divergence",
        tuple(Measure("holdfast: tail", metric, at_most=1e-5, rival="subtracted from the whole", of=words)
              for metric, words in (("relative error of 1 - p(y)", "1 − p(y), relative"), ("error of L", "L"))),
        "accuracy", "In brackets: the subtractive form."),
    Row("G1", "CE + KL on a GPU, bfloat16 / Liger's compiled, / plain torch, / QuACK's CE alone", "gpu",
        tuple(Measure(f"holdfast: {mine}", "gpu seconds, ratio", peer, "bfloat16", "4096/128256", "4096", goal)
              for mine, peer, goal in (("CE + full KL", "Liger", 0.75), ("CE + masked KL", "plain torch", 0.22),
                                       ("CE + masked KL", "QuACK", 1.4)))),
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a method makes of a training step: where its ratio stands, and what it is in words."""

    file: str
    measure: Measure
    method: str
    space: str
    model: str


def cost(file: str, variant: str, method: str, space: str, model: str) -> Cost:
    """One of the files whose metric is that of a step."""
    return Cost(file, Measure(variant, STEP), method, space, model)


M40, M135, M31 = (
    "40 M parameters, 1,024 tokens a step",
    "135 M parameters, 1,024 tokens a step",
    "31 M parameters, 8,192 tokens a step",
)
COSTS = (
    *(Cost("step", next(of_steps(variant, SFT, None)), method, "output", M40)
      for variant, method in ((LIVE, "masked KL, base run"), ("masked KL, cached", "masked KL, base cached"))),
    Cost("step", Measure(f"upper half: {SHARED}", TIME, f"upper half: {SFT}"),
         "masked KL, LoRA and base on the upper half", "output", M40),
    cost("self_replay", "135M, target_masked_kl, 16", "masked KL, base run", "output", M135),
    cost("self_replay", "135M, self-replay, 12 + 4", "self-replay, 4 of the 16 sequences", "output", M135),
    cost("self_replay", "135M, self-replay, 12 + 4, base run", "self-replay, 4 of the 16, base run", "output", M135),
    cost("self_replay", "135M, self-replay, 16 + 4", "self-replay, 4 beside the 16", "output", M135),
    cost("projection", "gradient, one mean", "projection of gradients, one mean", "gradient", M31),
    cost("projection", "update, k = 16", "projection of updates, basis every 30", "gradient", M31),
    cost("projection", "update, k = 16, refreshed every 5", "projection of updates, basis every 5", "gradient", M31),
    cost("penalties", "all four terms", "AlignGuard-LoRA, its four terms", "weight", M31),
    cost("penalties", "fisher_alignment, full", "Fisher alignment, full form", "weight", M31),
    cost("penalties", "ewc", "EWC", "weight", M31),
    cost("penalties", "update_decay", "update decay", "weight", M31),
)  # fmt: skip
