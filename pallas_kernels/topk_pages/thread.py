"""The code of one thread of a Hopper block: unsigned integers, branches, loops, and instructions that Pallas lacks.

Used inside ``plgpu.inline_mgpu``. A :class:`Word` is an unsigned integer of 1, 32 or 64 bits in a register; operators
take another of the same width or a Python int. Threads that work together are a :class:`Block`, or one
:class:`Warpgroup` of it: branches and loops must be taken alike by all of them if they hold a barrier, a vote, a sum or
a shuffle. Memory is addressed in bytes: global memory by 64 bits, shared by 32.
"""

from collections.abc import Callable, Sequence

from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

NAN_BITS = 0x7FFFFFFF
WARP = 0xFFFFFFFF  # every lane of a warp


class Word:
    """An unsigned integer in a register."""

    def __init__(self, value: ir.Value):
        self.value = value

    def _other(self, other) -> ir.Value:
        return other.value if isinstance(other, Word) else _constant(other, self.value.type)

    def _compare(self, predicate, other):
        return Word(arith.cmpi(predicate, self.value, self._other(other)))

    def __add__(self, other):
        return Word(arith.addi(self.value, self._other(other)))

    def __sub__(self, other):
        return Word(arith.subi(self.value, self._other(other)))

    def __mul__(self, other):
        return Word(arith.muli(self.value, self._other(other)))

    def __floordiv__(self, other):
        return Word(arith.divui(self.value, self._other(other)))

    def __and__(self, other):
        return Word(arith.andi(self.value, self._other(other)))

    def __or__(self, other):
        return Word(arith.ori(self.value, self._other(other)))

    def __xor__(self, other):
        return Word(arith.xori(self.value, self._other(other)))

    def __lshift__(self, other):
        return Word(arith.shli(self.value, self._other(other)))

    def __rshift__(self, other):
        return Word(arith.shrui(self.value, self._other(other)))

    def __lt__(self, other):
        return self._compare(arith.CmpIPredicate.ult, other)

    def __le__(self, other):
        return self._compare(arith.CmpIPredicate.ule, other)

    def __gt__(self, other):
        return self._compare(arith.CmpIPredicate.ugt, other)

    def __ge__(self, other):
        return self._compare(arith.CmpIPredicate.uge, other)


def word(value: int) -> Word:
    """Return a constant of 32 bits."""
    return Word(_constant(value, _bits(32)))


def wide(number: Word) -> Word:
    """Return 32 bits as 64."""
    return Word(arith.extui(_bits(64), number.value))


def narrow(number: Word) -> Word:
    """Return the low 32 of 64 bits."""
    return Word(arith.trunci(_bits(32), number.value))


def one_if(condition: Word) -> Word:
    """Return a condition as 0 or 1 of 32 bits."""
    return Word(arith.extui(_bits(32), condition.value))


def where(condition: Word, yes: Word | int, no: Word | int) -> Word:
    """Return ``yes`` where the condition holds, else ``no``; two ints give 32 bits."""
    like = next((number for number in (yes, no) if isinstance(number, Word)), word(0))
    return Word(arith.select(condition.value, like._other(yes), like._other(no)))


def branch(
    condition: Word, yes: Callable[[], Sequence[Word]], no: Callable[[], Sequence[Word]], widths: Sequence[int] = ()
) -> list[Word]:
    """Run one of two functions, which return words of these widths."""
    operation = scf.IfOp(condition.value, [_bits(width) for width in widths], has_else=True)
    for block, function in ((operation.then_block, yes), (operation.else_block, no)):
        with ir.InsertionPoint(block):
            scf.yield_([number.value for number in function()])
    return list(map(Word, operation.results))


def loop(condition: Callable[..., Word], body: Callable[..., Sequence[Word]], start: Sequence[Word]) -> list[Word]:
    """Run ``body`` on the words, which returns the next, as long as the condition on them holds."""
    types = [number.value.type for number in start]
    operation = scf.WhileOp(types, [number.value for number in start])
    before = operation.before.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(before):
        scf.condition(condition(*map(Word, before.arguments)).value, list(before.arguments))
    after = operation.after.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_([number.value for number in body(*map(Word, after.arguments))])
    return list(map(Word, operation.results))


class Block:
    """All threads of a block; :attr:`index` is this one's number among them."""

    _barrier = "0"

    def __init__(self):
        self.index = _instruction("mov.u32 $0, %tid.x;")

    def barrier(self) -> None:
        """Wait for all of the threads; what they stored in shared memory is then seen."""
        _instruction(f"bar.sync {self._barrier};", width=None)

    def vote(self, condition: Word) -> Word:
        """Return in how many of the threads a condition holds; a barrier."""
        return _instruction(f"bar.red.popc.u32 $0, {self._barrier}, $1;", condition)


class Warpgroup(Block):
    """The 128 threads of one warpgroup of a block, whose other warpgroups must not use this class at the same time."""

    # Of the 16 hardware barriers of a block Mosaic GPU takes 0 for all threads and 1 to 8 for its warpgroups.
    _barrier = "15, 128"

    def __init__(self):
        super().__init__()
        self.index = self.index & 127


def block_index() -> Word:
    """Return the number of this thread's block."""
    return _instruction("mov.u32 $0, %ctaid.x;")


def address(ref: ir.Value) -> Word:
    """Return where a reference begins, in 64 bits for global memory and 32 for shared."""
    pointer = mgpu.utils.memref_ptr(ref)
    shared = mgpu.utils.is_smem_ref(ref)
    return _instruction(f"mov.b{32 if shared else 64} $0, $1;", pointer, width=32 if shared else 64)


def load_word(at: Word, condition: Word | None = None, *, written: bool = False) -> Word:
    """Load 32 bits of global memory, or NaN where the condition does not hold.

    ``written`` says that the kernel also writes there, in any of its blocks.
    """
    load = _load_global(written)
    if condition is None:
        return _instruction(f"{load}.b32 $0, [$1];", at)
    return _instruction(f"mov.b32 $0, {NAN_BITS}; @$2 {load}.b32 $0, [$1];", at, condition)


def load_four(at: Word, condition: Word, *, written: bool = False) -> list[Word]:
    """Load 16 aligned bytes of global memory, or four NaN; ``written`` as in :func:`load_word`."""
    text = "".join(f"mov.b32 ${i}, {NAN_BITS}; " for i in range(4))
    text += f"@$5 {_load_global(written)}.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    results = mgpu.utils.inline_ptx(
        text, at.value, condition.value, result_types=[_bits(32)] * 4, has_side_effects=True
    )
    return list(map(Word, results))


def store_word(at: Word, number: Word, condition: Word) -> None:
    """Store 32 bits in global memory where the condition holds."""
    _instruction("@$2 st.global.b32 [$0], $1;", at, number, condition, width=None)


def load_shared(at: Word) -> Word:
    """Load 32 bits of shared memory."""
    return _instruction("ld.shared.b32 $0, [$1];", at)


def store_shared(at: Word, numbers: Sequence[Word], condition: Word) -> None:
    """Store one or two words of 32 bits in shared memory where the condition holds."""
    kind, numbered = ("b32", "$1") if len(numbers) == 1 else ("v2.b32", "{$1, $2}")
    _instruction(f"@${len(numbers) + 1} st.shared.{kind} [$0], {numbered};", at, *numbers, condition, width=None)


def set_bits_shared(at: Word, bits: Word, condition: Word) -> None:
    """Set bits of a word of shared memory where the condition holds, atomically."""
    _instruction("@$2 red.shared.or.b32 [$0], $1;", at, bits, condition, width=None)


def add_shared(at: Word, number: Word, condition: Word) -> Word:
    """Add to a word of shared memory where the condition holds, atomically, and return what it was; else 0."""
    return _instruction("mov.b32 $0, 0; @$3 atom.shared.add.u32 $0, [$1], $2;", at, number, condition)


def warp_reduce(kind: str, number: Word) -> Word:
    """Return the ``add``, ``max`` or ``min`` of a warp's numbers."""
    return _instruction(f"redux.sync.{kind}.u32 $0, $1, {WARP};", number)


def warp_sums(number: Word, lane: Word) -> Word:
    """Return the sum of the numbers of a warp's lanes up to this one."""
    for distance in (1, 2, 4, 8, 16):
        below = _instruction(f"shfl.sync.up.b32 $0, $1, {distance}, 0, {WARP};", number)
        number = where(lane >= distance, number + below, number)
    return number


def from_lane(number: Word, lane: int) -> Word:
    """Return one lane's number to all lanes of its warp."""
    return _instruction(f"shfl.sync.idx.b32 $0, $1, {lane}, 31, {WARP};", number)


def count_ones(number: Word) -> Word:
    """Return how many bits are set."""
    return _instruction("popc.b32 $0, $1;", number)


def float_max(a: Word, b: Word) -> Word:
    """Return the larger of the bits of two float32, of which NaN is the smallest."""
    return _instruction("max.f32 $0, $1, $2;", a, b)


def float_at_least(a: Word, b: Word) -> Word:
    """Return whether the float32 of some bits is at least another's; false for NaN."""
    numbers = (arith.bitcast(ir.F32Type.get(), each.value) for each in (a, b))
    return Word(arith.cmpf(arith.CmpFPredicate.OGE, *numbers))


def _load_global(written: bool) -> str:
    # A relaxed load passes by the cache of this multiprocessor, which may hold what was there before.
    return "ld.relaxed.gpu.global" if written else "ld.global.nc"


def _instruction(text, *operands, width: int | None = 32):
    """Insert PTX; it keeps its place among other such, and no copy of it may be made or moved over a branch."""
    values = [operand.value if isinstance(operand, Word) else operand for operand in operands]
    types = None if width is None else _bits(width)
    result = mgpu.utils.inline_ptx(text, *values, result_types=types, has_side_effects=True, convergent=True)
    return None if width is None else Word(result)


def _bits(width: int) -> ir.Type:
    return ir.IntegerType.get_signless(width)


def _constant(value: int, kind: ir.Type) -> ir.Value:
    width = ir.IntegerType(kind).width
    return mgpu.c(value - (1 << width) if value >> (width - 1) else value, kind)
