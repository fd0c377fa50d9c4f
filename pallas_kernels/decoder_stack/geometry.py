"""Sizes of a decode step over stacked layers, and how a persistent kernel divides its work.

A *unit* is what one trip through the kernel's ring of buffers brings: ``UNIT`` rows of the contraction by 128 features
of a product, or the keys or values of ``UNIT`` cache slots of one head. The units of a product, tile by tile, are dealt
to the blocks in contiguous runs of equal length; a block that begins a tile collects what the following blocks add.
"""

import dataclasses

UNIT = 128
QKV, ATTENTION, OUT, GATE_UP, DOWN = range(5)  # phases of a layer; scores of pages come between the first two
MAX_ROWS = 64
MAX_SPLITS = 64
MAX_GROUP = 23  # and a column for the new key
PAGE_SIZES = (16, 32, 64, 128)
MAX_PAGES = 8192  # whose bits have room in shared memory
MAX_CHOSEN, MAX_FORCED = 112, 16  # pages, by the threads of a warpgroup and the room for their numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How a step reads the pages of the highest scores only; see :func:`pallas_kernels.page_scores`, reduced by max.

    Args:
        kind: of the summaries, ``"mean"`` or ``"bounds"``.
        page_size: slots of a page.
        pages: how many pages a layer reads of each key/value head at most, sinks and recent ones among them.
        sinks, recent: first and last pages that are always read; the last page is that of the new token.
        dense_layers: layers, from the first on, that read everything.
    """

    kind: str
    page_size: int
    pages: int
    sinks: int = 0
    recent: int = 1
    dense_layers: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Static sizes of one kernel.

    Args:
        layers: stacked layers L.
        d_model, d_ff, kv_heads, group, head_dim: sizes of a layer; ``group`` query heads share a key/value head.
        batch: sequences; ``capacity`` cache slots of each.
        blocks: thread blocks that run at once, one a multiprocessor.
        peers: devices that share a layer; ``d_ff`` and ``kv_heads`` are those of one of them.
        select: which pages layers read, ``None`` for all; ``num_pages`` are those that summaries have room for.
    """

    layers: int
    d_model: int
    d_ff: int
    kv_heads: int
    group: int
    head_dim: int
    batch: int
    capacity: int
    blocks: int
    peers: int = 1
    select: Selection | None = None
    num_pages: int = 0

    def phase(self, entry, step):
        """Return how many phases are over when those before a step of an entry of the order are."""
        scores = int(self.select is not None)
        return entry * (5 + scores) + step + (scores if step > ATTENTION else 0)

    def scored(self, entry):
        """Return how many phases are over when pages have been scored, where layers select."""
        return self.phase(entry, ATTENTION) + 1

    @property
    def rows(self) -> int:
        """Rows of the tensor-core products: the batch, padded to 8, 16, 32 or 64."""
        return next(rows for rows in (8, 16, 32, MAX_ROWS) if rows >= self.batch)

    @property
    def head_rows(self) -> int:
        """Rows kept for a key/value head: its query heads and one for the new key, padded to 8."""
        return -(-(self.group + 1) // 8) * 8

    @property
    def tiles(self) -> int:
        """Tiles of 128 features of the residual stream."""
        return self.d_model // 128

    @property
    def padded_tiles(self) -> int:
        """Rows of the arrays of per-tile sums."""
        return -(-self.tiles // 64) * 64

    @property
    def heads(self) -> int:
        """Query, key and value heads together."""
        return self.kv_heads * (self.group + 2)

    @property
    def splits(self) -> int:
        """Parts into which the cache of one head is divided."""
        return max(1, min(MAX_SPLITS, self.blocks // (self.batch * self.kv_heads)))

    @property
    def items(self) -> int:
        """Pieces of attention: one a sequence, key/value head and split."""
        return self.batch * self.kv_heads * self.splits

    @property
    def mlp_features(self) -> int:
        """Features of the MLP in a tile, the units of their gates first; of the most rows registers hold only 64."""
        return 64 if self.rows == MAX_ROWS else 128

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Tiles and contraction units of each product."""
        queries = self.kv_heads * self.group * self.head_dim
        return {
            "qkv": (self.heads, self.d_model // UNIT),
            "out": (self.tiles, queries // UNIT),
            "gate_up": (self.d_ff // self.mlp_features, self.mlp_features // 64 * self.d_model // UNIT),
            "down": (self.tiles, self.d_ff // UNIT),
        }

    @property
    def stages(self) -> int:
        """Units in the ring of weights; the most query heads leave room for one less beside the fewest rows."""
        less = self.rows == 8 and (self.head_rows == 24 or (self.head_rows == 16 and self.select is not None))
        return {8: 6, 16: 5, 32: 5, 64: 4}[self.rows] - less

    @property
    def in_flight(self) -> int:
        """Units of weights that are being read at once; more would only lengthen every other trip through memory."""
        return {8: 3, 16: 3, 32: 3, 64: 2}[self.rows]

    @property
    def feeds(self) -> int:
        """Units in the ring of activations; more query heads leave less room for them, and for weights."""
        fit = {8: (8, 5, 8), 16: (8, 8, 8), 32: (5, 4, 3), 64: (4, 3, 3)}
        if self.select is not None:
            fit = {8: (6, 8, 8), 16: (8, 8, 6), 32: (4, 3, 2), 64: (3, 3, 2)}
        return fit[self.rows][self.head_rows // 8 - 1]

    @property
    def made_together(self) -> int:
        """Units of activations for layers that did not run whose states are asked for at once."""
        return {8: 4, 16: 2, 32: 1, 64: 1}[self.rows]

    @property
    def page_parts(self) -> int:
        """Transfers that bring a unit of pages: two halves, of as many pages as fit."""
        return 2 * (UNIT // self.select.page_size)

    @property
    def bounds(self) -> int:
        """Units that hold the summaries of ``UNIT`` pages of a head."""
        return 2 if self.select.kind == "bounds" else 1

    @property
    def score_chunks(self) -> int:
        """Runs of ``UNIT`` pages that are scored at a time."""
        return -(-self.num_pages // UNIT)

    @property
    def score_items(self) -> int:
        """Pieces of scoring: one a sequence, key/value head and chunk."""
        return self.batch * self.kv_heads * self.score_chunks

    @property
    def together(self) -> int:
        """Other blocks' parts of a tile that are asked for at once; more take registers, and time."""
        return {8: 4, 16: 3, 32: 2, 64: 1}[self.rows]

    @property
    def inbox(self) -> tuple[int, ...]:
        """Shape of what devices send each other: of output and down projection, by sender, halves of tiles."""
        return (2, self.peers, self.tiles, 2, 64, self.rows) if self.peers > 1 else (1,)

    @property
    def shared_features(self) -> int:
        """Features that one block combines, of what all splits of a head have mixed."""
        return 32 if self.splits >= 4 else 64

    @property
    def sharers(self) -> int:
        """Splits of a head that combine its features, the first ones."""
        return self.head_dim // self.shared_features

    @property
    def splits_together(self) -> int:
        """Splits whose part of the features is asked for at once; more would not fit a thread's registers."""
        turns = -(-self.splits // {8: 17, 16: 8, 24: 5}[self.head_rows])
        return -(-self.splits // turns)

    @property
    def split_places(self) -> int:
        """Splits that could be asked for: whole turns."""
        return -(-self.splits // self.splits_together) * self.splits_together


def refuse_parts(parts: dict[str, int], sizes: dict[str, int]) -> str | None:
    """Return why devices cannot share layers of these sizes by heads and MLP, or ``None``."""
    if parts["width"] > 1:
        return f"needs whole rows of weights on each device, got a mesh that splits them in {parts['width']}"
    if sizes["kv_heads"] % parts["heads"] or sizes["d_ff"] % parts["heads"]:
        return (
            f"needs key/value heads and d_ff that divide by the {parts['heads']} devices that share them, got "
            f"{sizes['kv_heads']} and {sizes['d_ff']}"
        )
    return None


def refuse_geometry(geometry: Geometry) -> str | None:
    """Return why the kernel cannot serve these sizes, or ``None``."""
    g = geometry
    if g.head_dim != 128:
        return f"needs head_dim 128, got {g.head_dim}"
    if g.d_model % UNIT or g.d_ff % UNIT:
        return f"needs d_model and d_ff to be multiples of {UNIT}, got {g.d_model} and {g.d_ff}"
    if not 1 <= g.batch <= MAX_ROWS:
        return f"needs 1 to {MAX_ROWS} sequences, got {g.batch}"
    if g.group > MAX_GROUP:
        return f"needs at most {MAX_GROUP} query heads for a key/value head, got {g.group}"
    if g.capacity % 8:
        return f"needs a cache capacity that is a multiple of 8, got {g.capacity}"
    return None if g.select is None else _refuse_selection(g)


def _refuse_selection(g: Geometry) -> str | None:
    if g.select.page_size not in PAGE_SIZES or g.capacity < 64:
        sizes = ", ".join(map(str, PAGE_SIZES))
        return f"needs pages of {sizes} slots and a capacity of at least 64, got {g.select.page_size} of {g.capacity}"
    if g.num_pages > 8 and g.num_pages % 8:
        return f"needs summaries with room for a multiple of 8 pages, got {g.num_pages}"
    if g.num_pages > MAX_PAGES:
        return f"chooses from at most {MAX_PAGES} pages, got {g.num_pages}; use larger pages"
    forced = g.select.sinks + g.select.recent
    if g.select.pages - forced > MAX_CHOSEN or forced > MAX_FORCED:
        got = f"{g.select.pages - forced} and {forced}"
        return f"chooses at most {MAX_CHOSEN} pages beside at most {MAX_FORCED} that are always read, got {got}"
    return None
