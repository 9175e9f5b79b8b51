"""Tiles: whose they are, their memory, their products."""

import triton
import triton.language as tl


@triton.jit
def program_of(tiles, heads, together, REVERSED: tl.constexpr):
    """(tile, head, sequence) of this program.

    Programs start in the order of their numbers, each where one has ended, so that under a causal mask those that see
    most come first: all last tiles (first ones where not REVERSED) of `together` heads, then those before them.
    """
    pid = tl.program_id(0)
    first = pid // (tiles * together) * together
    rest = pid % (tiles * together)
    here = tl.minimum(together, tl.num_programs(0) // tiles - first)
    tile = rest // here
    if REVERSED:
        tile = tiles - 1 - tile
    head = first + rest % here
    return tile, head % heads, head // heads


@triton.jit
def rows_of(rows, b, h, first):
    """The address of row `first` of head h, sequence b."""
    return (
        rows.ptr
        + tl.cast(b, tl.int64) * rows.batch
        + tl.cast(h, tl.int64) * rows.head
        + tl.cast(first, tl.int64) * rows.token
    )


@triton.jit
def _places(base, rows, start, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    row = tl.arange(0, BLOCK)[:, None]
    if rows.wide is not None:
        row = row.to(tl.int64)
    return base + tl.cast(start, tl.int64) * rows.token + (row * rows.token + tl.arange(0, BLOCK_WIDTH)[None, :])


@triton.jit
def load_rows(
    base, rows, start, inside, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TEST: tl.constexpr
):
    """Rows start..start + BLOCK of the head at `base`, [BLOCK, BLOCK_WIDTH]; 0 past WIDTH or not `inside` [BLOCK].

    TEST: whether to look at `inside` at all.
    """
    places = _places(base, rows, start, BLOCK, BLOCK_WIDTH)
    if TEST:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(places, mask=inside[:, None], other=0.0)
        return tl.load(places, mask=inside[:, None] & (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(places)
        return tl.load(places, mask=(tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :], other=0.0)


@triton.jit
def load_tile(
    descriptor, base, rows, b, h, first, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Rows start..start + BLOCK, all of which exist, of the head at `base`; its row 0 is row `first` of the tensor.

    By the tensor's descriptor, if there is one: the hardware then computes the addresses.
    """
    if descriptor is not None:
        return tl.reshape(descriptor.load([b, h, first + start, 0]), (BLOCK, BLOCK_WIDTH))
    else:
        return load_rows(base, rows, start, None, BLOCK, WIDTH, BLOCK_WIDTH, False)


@triton.jit
def store_rows(base, rows, start, inside, x, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write the rows of x [BLOCK, BLOCK_WIDTH] where `inside` [BLOCK] says so."""
    places = _places(base, rows, start, BLOCK, BLOCK_WIDTH)
    columns = tl.arange(0, BLOCK_WIDTH) < WIDTH
    tl.store(places, x.to(base.dtype.element_ty), mask=inside[:, None] & columns[None, :])


@triton.jit
def product(a, b, sum, PRECISION: tl.constexpr):
    """a @ b + sum in float32; `sum` may be None.

    PRECISION: of float32 operands, "ieee" or "tf32"; "widen" turns all operands to float32 first, for the interpreter,
    which multiplies the bits of bfloat16.
    """
    if PRECISION == "widen":
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        return result if sum is None else result + sum
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def narrow(x, like, PRECISION: tl.constexpr):
    """x in the dtype of `like`, to be an operand of `product` beside it."""
    if PRECISION == "widen":
        return x
    else:
        return x.to(like.dtype)
