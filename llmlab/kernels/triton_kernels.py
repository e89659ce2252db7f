"""Triton kernels over packed weights of 2, 3, 4 or 8 bits: products with few and with more rows, and unpacking.

32 values of a column fill BITS words whatever BITS is, so a chunk of 32 input features is the unit of all three: a
thread reads each word once and takes its fields apart in registers. A chunk lies in one group (groups are multiples of
32, in order), so with scale s and zero point z of a column and group

    sum_k x_k s (c_k - z) = s (sum_k x_k c_k - z sum_k x_k)

needs one multiply-add a weight, in fp32. The reductions run over K in a fixed order: results repeat to the bit.

No annotations but tl.constexpr: Triton compiles what stands here, and takes another type's name for a global variable.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl


@triton.constexpr_function
def exponent(bit, bits):
    """Place in a float's 23 bits at which `_code` leaves the field that begins at `bit` of a word."""
    if bit + bits > 32:
        return 0
    return bit if bit + bits <= 23 else bit - 16


@triton.jit
def _field(word, following, BIT: tl.constexpr, BITS: tl.constexpr):
    """The integer in bits BIT .. BIT + BITS - 1; at 3 bits it may go on in the following word."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if BIT + BITS <= 32:
        return (word >> BIT) & LEVELS
    else:
        HERE: tl.constexpr = (1 << (32 - BIT)) - 1  # >> carries the sign
        return ((word >> BIT) & HERE) | ((following << (32 - BIT)) & LEVELS)


@triton.jit
def _magic(positive):
    """The bits of 2^23 as fp32; with a field in its mantissa, by "or", they are those of 2^23 + the field.

    That is faster than to convert integers. The compiler must not know the value: an instruction takes one constant, so
    a mask and an unknown are "and" and "or" in one.
    """
    return 0x4B000000 + tl.minimum(positive, 0)


@triton.jit
def _code(word, following, magic, BIT: tl.constexpr, BITS: tl.constexpr):
    """The same times 2^exponent as fp32; a field is moved only where it would leave the mantissa of `magic`."""
    if BIT + BITS > 32:
        field = _field(word, following, BIT, BITS)
    else:
        AT: tl.constexpr = exponent(BIT, BITS)
        field = (word >> (BIT - AT)) & (((1 << BITS) - 1) << AT)
    return (field | magic).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _zeros(qzeros, group, columns, inside, stride, BITS: tl.constexpr):
    """Zero points [chunks, columns] as fp32; stored minus one modulo 2^BITS, packed along the columns."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    bit = (columns * BITS)[None, :]
    at = qzeros + group[:, None] * stride + bit // 32
    shift = bit % 32
    word = tl.load(at, mask=inside, other=0)
    field = word >> shift
    if 32 % BITS != 0:
        here = tl.minimum(32 - shift, BITS)  # bits of the field in this word
        beyond = tl.load(at + 1, mask=inside & (here < BITS), other=0)
        field = (field & ((1 << here) - 1)) | (beyond << here)
    return ((field + 1) & LEVELS).to(tl.float32)


@triton.jit
def gemv_kernel(
    x, qweight, qzeros, scales, y, M, N, K, chunks_a_lane, word_stride, zero_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [splits, M, N] in its own dtype: the part of x [M, K] W^T that a split's chunks of K give, for ROWS rows.

    Every lane (a row of the tile: a warp) goes through chunks of its own; their sums are added at the end.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns < N)[None, :]
    magic = _magic(K)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    first = tl.program_id(2) * ROWS
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros((LANES, BLOCK_N), tl.float32),)
    for step in range(chunks_a_lane):
        chunk = lane * chunks_a_lane + step
        here = chunk < K // 32
        chunk = tl.minimum(chunk, K // 32 - 1)  # past the end a lane repeats the last chunk, with scales of 0
        words = ()
        for word in tl.static_range(BITS):
            at = qweight + (chunk * BITS + word)[:, None] * word_stride + columns[None, :]
            words += (tl.load(at, mask=inside, other=0),)
        group = chunk * 32 // GROUP
        at = scales + group[:, None] * scale_stride + columns[None, :]
        scale = tl.load(at, mask=here[:, None] & inside, other=0.0).to(tl.float32)
        zero = _zeros(qzeros, group, columns, inside, zero_stride, BITS)
        sums, products = (), ()
        for _ in tl.static_range(ROWS):
            sums += (tl.zeros((LANES,), tl.float32),)
            products += (tl.zeros((LANES, BLOCK_N), tl.float32),)
        for j in tl.static_range(32):
            word = words[j * BITS // 32]
            following = words[(j * BITS + BITS - 1) // 32]
            code = _code(word, following, magic, j * BITS % 32, BITS)
            down = 1.0 / (1 << exponent(j * BITS % 32, BITS))
            new_sums, new_products = (), ()
            for row in tl.static_range(ROWS):
                at = x + tl.minimum(first + row, M - 1) * K + chunk * 32 + j
                value = tl.load(at).to(tl.float32)
                new_sums += (sums[row] + value,)
                new_products += (products[row] + (value * down)[:, None] * code,)
            sums, products = new_sums, new_products
        new_totals = ()
        for row in tl.static_range(ROWS):
            new_totals += (totals[row] + scale * (products[row] - zero * sums[row][:, None]),)
        totals = new_totals
    for row in tl.static_range(ROWS):
        total = tl.sum(totals[row], axis=0)
        at = y + (tl.program_id(1) * M + first + row) * N + columns
        tl.store(at, total.to(y.dtype.element_ty), mask=(columns < N) & (first + row < M))


@triton.jit
def _tile_of_fields(at, inside, stride, BITS: tl.constexpr):
    """Integers [units, values, columns] of units of whole words: of one word or, at 3 bits, of three.

    at, inside: pointers and mask of the first words, [units, columns].
    """
    if 32 % BITS == 0:
        bit = (tl.arange(0, 32 // BITS) * BITS)[None, :, None]
        return (tl.load(at, mask=inside, other=0)[:, None, :] >> bit) & ((1 << BITS) - 1)
    else:
        low = tl.load(at, mask=inside, other=0)[:, None, :]
        middle = tl.load(at + stride, mask=inside, other=0)[:, None, :]
        high = tl.load(at + 2 * stride, mask=inside, other=0)[:, None, :]
        bit = (tl.arange(0, 32) * BITS)[None, :, None]
        word = tl.where(bit < 32, low, tl.where(bit < 64, middle, high))
        following = tl.where(bit < 32, middle, high)
        here = tl.minimum(32 - bit % 32, BITS)  # bits of the field in the word; >> carries the sign
        return ((word >> (bit % 32)) & ((1 << here) - 1)) | ((following << here) & ((1 << BITS) - 1))


@triton.jit
def tile_kernel(
    x, qweight, qzeros, scales, y, M, N, K, steps, word_stride, zero_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for more rows, y [splits, M, N]: a tile of weights is rounded to the dtype of x and goes into tl.dot."""
    VALUES: tl.constexpr = 32 // BITS if 32 % BITS == 0 else 32
    UNITS: tl.constexpr = BLOCK_K // VALUES
    magic = _magic(K)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.program_id(1) * steps, (tl.program_id(1) + 1) * steps):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        values = tl.load(x + rows[:, None] * K + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        unit = step * UNITS + tl.arange(0, UNITS)
        inside = (unit * VALUES < K)[:, None] & (columns < N)[None, :]
        at = qweight + (unit * (VALUES * BITS // 32))[:, None] * word_stride + columns[None, :]
        fields = _tile_of_fields(at, inside, word_stride, BITS)
        group = unit * VALUES // GROUP
        at = scales + group[:, None] * scale_stride + columns[None, :]
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        zero = _zeros(qzeros, group, columns, inside, zero_stride, BITS)
        codes = (fields | magic).to(tl.float32, bitcast=True)
        weights = (codes - (zero + 8388608.0)[:, None, :]) * scale[:, None, :]
        weights = tl.reshape(weights.to(values.dtype), (BLOCK_K, BLOCK_N))
        total = tl.dot(values, weights, total, input_precision="ieee")
    at = y + (tl.program_id(1) * M + rows)[:, None] * N + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def sum_kernel(parts, y, size, splits, BLOCK: tl.constexpr):
    """y [size] in its own dtype: the sum of parts [splits, size] in fp32, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def dequantize_kernel(
    qweight, qzeros, scales, w, N, word_stride, zero_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w [K, N] in its own dtype: s (c - z), computed in fp32; a program writes 32 rows of BLOCK_N columns."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.program_id(1) + tl.arange(0, 1)
    inside = (columns < N)[None, :]
    words = ()
    for word in tl.static_range(BITS):
        at = qweight + (chunk * BITS + word)[:, None] * word_stride + columns[None, :]
        words += (tl.load(at, mask=inside, other=0),)
    group = chunk * 32 // GROUP
    scale = tl.load(scales + group[:, None] * scale_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    zero = _zeros(qzeros, group, columns, inside, zero_stride, BITS)
    for j in tl.static_range(32):
        field = _field(words[j * BITS // 32], words[(j * BITS + BITS - 1) // 32], j * BITS % 32, BITS)
        at = w + (chunk * 32 + j).to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, ((field.to(tl.float32) - zero) * scale).to(w.dtype.element_ty), mask=inside)
