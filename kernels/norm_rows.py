"""The passes of ``add_norm``: rows are added, dropped and normalised, and their gradients.

A program has a few rows, in blocks of columns. It goes over them twice, first for their statistics;
the second time they come from the cache.
"""

import triton
import triton.language as tl


@triton.jit
def sum_of(
    branch_ptr, shortcut_ptr, keep_ptr, factor, at, inside
):  # fmt: skip
    """shortcut + factor * keep * branch of a tile, rounded as it is stored"""
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    if keep_ptr is not None:
        branch = tl.where(tl.load(keep_ptr + at, mask=inside, other=0) != 0, branch, 0.0)
    total = tl.load(shortcut_ptr + at, mask=inside, other=0.0).to(tl.float32) + branch
    return total.to(branch_ptr.dtype.element_ty)


@triton.jit
def rows_of(tile, M, BLOCK_R: tl.constexpr):
    """The rows of a tile, in 64 bits, and which of them there are."""
    rows = tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return rows, rows < M


@triton.jit
def factor_of(row_scale_ptr, rows, in_rows, scale, BLOCK_R: tl.constexpr):
    if row_scale_ptr is None:
        return tl.full((BLOCK_R,), 1.0, tl.float32) * scale
    else:
        return tl.load(row_scale_ptr + rows, mask=in_rows, other=0.0).to(tl.float32) * scale


@triton.jit
def store_normalised(
    y_ptr, s, mean, rstd, weight_ptr, bias_ptr, at, offs, in_d, inside
):  # fmt: skip
    y = (s - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs, mask=in_d, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=in_d, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


# Computes: sum = shortcut + scale * row_scale[m] * keep * branch, y = norm(sum)
# Reads:    branch, shortcut [M, D] once, keep one byte an element; once more from the cache
# Writes:   sum, y [M, D] once; mean, rstd [M] fp32
# Traffic:  (3 or 4)*M*D*sizeof(branch) + M*D bytes
# Split:    one program = BLOCK_R rows; deviations from the mean in fp32, of the rounded sum


@triton.jit(do_not_specialize=["M"])
def add_norm_fwd_kernel(
    branch_ptr, shortcut_ptr, weight_ptr, bias_ptr, keep_ptr, row_scale_ptr, y_ptr, sum_ptr,
    mean_ptr, rstd_ptr, M, D, scale, eps, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, in_rows = rows_of(tl.program_id(0), M, BLOCK_R)
    factor = factor_of(row_scale_ptr, rows, in_rows, scale, BLOCK_R)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    m2 = tl.zeros((BLOCK_R,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        offs = d0 + tl.arange(0, BLOCK_D)
        inside = in_rows[:, None] & (offs < D)[None, :]
        at = rows[:, None] * D + offs[None, :]
        total = sum_of(branch_ptr, shortcut_ptr, keep_ptr, factor, at, inside)
        tl.store(sum_ptr + at, total, mask=inside)
        s = total.to(tl.float32)
        if NORM == "layer":  # Chan, Golub and LeVeque 1983, eq. 2.1
            count = tl.minimum(D - d0, BLOCK_D).to(tl.float32)
            tile_mean = tl.sum(s, 1) / count
            deviation = tl.where(inside, s - tile_mean[:, None], 0.0)
            delta = tile_mean - mean
            share = count / (d0 + count)
            mean += delta * share
            m2 += tl.sum(deviation * deviation, 1) + delta * delta * (d0 * share)
        elif NORM == "rms":
            m2 += tl.sum(s * s, 1)
    if NORM != "none":
        rstd = tl.rsqrt(m2 / D + eps)
        tl.store(rstd_ptr + rows, rstd, mask=in_rows)
        if NORM == "layer":
            tl.store(mean_ptr + rows, mean, mask=in_rows)
        for d0 in range(0, D, BLOCK_D):
            offs = d0 + tl.arange(0, BLOCK_D)
            in_d = offs < D
            inside = in_rows[:, None] & in_d[None, :]
            at = rows[:, None] * D + offs[None, :]
            s = sum_of(branch_ptr, shortcut_ptr, keep_ptr, factor, at, inside).to(tl.float32)
            store_normalised(
                y_ptr, s, mean, rstd, weight_ptr, bias_ptr, at, offs, in_d, inside
            )  # fmt: skip


@triton.jit
def slope_of(
    total_ptr, dy_ptr, weight_ptr, mean, rstd, at, offs, in_d, inside
):  # fmt: skip
    """dy, the normalised sum and dy * weight of a tile; zeros outside."""
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(inside, (s - mean[:, None]) * rstd[:, None], 0.0)
    slope = dy
    if weight_ptr is not None:
        slope *= tl.load(weight_ptr + offs, mask=in_d, other=0.0).to(tl.float32)[None, :]
    return dy, normed, slope


# Computes: dshortcut = dsum + rstd * (g - mean_d g - n * mean_d(g * n)), g = dy * weight, n the
#           normalised sum (rms: without mean_d g); dbranch = scale * row_scale[m] * keep * that
# Reads:    sum, dy [M, D] once (once more from the cache), dsum once; keep; mean, rstd [M]
# Writes:   dshortcut, dbranch [M, D] once; part_dweight, part_dbias [programs, D] fp32
# Traffic:  (3 to 5)*M*D*sizeof(sum) + M*D bytes; parts below 1% of it from 800 rows a program on
# Split:    one program = ``tiles`` times BLOCK_R rows; sums along a row and over the rows in fp32


@triton.jit(do_not_specialize=["M", "tiles"])
def add_norm_bwd_kernel(
    total_ptr, dy_ptr, dsum_ptr, weight_ptr, mean_ptr, rstd_ptr, keep_ptr, row_scale_ptr,
    dbranch_ptr, dshortcut_ptr, part_dweight_ptr, part_dbias_ptr, M, D, tiles, scale,
    NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(tiles):
        rows, in_rows = rows_of(tl.program_id(0) * tiles + t, M, BLOCK_R)
        mean = tl.zeros((BLOCK_R,), tl.float32)
        rstd = tl.zeros((BLOCK_R,), tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        if dy_ptr is not None:
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        sum_g = tl.zeros((BLOCK_R,), tl.float32)
        sum_gn = tl.zeros((BLOCK_R,), tl.float32)
        if dy_ptr is not None:
            for d0 in range(0, D, BLOCK_D):
                offs = d0 + tl.arange(0, BLOCK_D)
                in_d = offs < D
                inside = in_rows[:, None] & in_d[None, :]
                at = rows[:, None] * D + offs[None, :]
                _, n, g = slope_of(
                    total_ptr, dy_ptr, weight_ptr, mean, rstd, at, offs, in_d, inside
                )
                if NORM == "layer":
                    sum_g += tl.sum(g, 1)
                sum_gn += tl.sum(g * n, 1)
        factor = factor_of(row_scale_ptr, rows, in_rows, scale, BLOCK_R)
        for d0 in range(0, D, BLOCK_D):
            offs = d0 + tl.arange(0, BLOCK_D)
            in_d = offs < D
            inside = in_rows[:, None] & in_d[None, :]
            at = rows[:, None] * D + offs[None, :]
            ds = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
            if dsum_ptr is not None:
                ds = tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if dy_ptr is not None:
                dy, n, g = slope_of(
                    total_ptr, dy_ptr, weight_ptr, mean, rstd, at, offs, in_d, inside
                )  # fmt: skip
                ds += (g - (sum_g / D)[:, None] - n * (sum_gn / D)[:, None]) * rstd[:, None]
                if part_dweight_ptr is not None:
                    dweight += tl.sum(dy * n, 0)
                    dbias += tl.sum(dy, 0)
            tl.store(dshortcut_ptr + at, ds.to(dshortcut_ptr.dtype.element_ty), mask=inside)
            if dbranch_ptr is not None:
                if keep_ptr is not None:
                    kept = tl.load(keep_ptr + at, mask=inside, other=0) != 0
                    ds = tl.where(kept, ds, 0.0)
                ds *= factor[:, None]
                tl.store(dbranch_ptr + at, ds.to(dbranch_ptr.dtype.element_ty), mask=inside)
    if part_dweight_ptr is not None:
        offs = tl.arange(0, BLOCK_D)
        at = tl.program_id(0).to(tl.int64) * D + offs
        tl.store(part_dweight_ptr + at, dweight, mask=offs < D)
        tl.store(part_dbias_ptr + at, dbias, mask=offs < D)


# Computes: sums over a chunk of rows of dy * n and of dy (see add_norm_bwd)
# Reads:    sum, dy [M, D] once; mean, rstd [M]
# Writes:   part_dweight, part_dbias [chunks, D] fp32
# Traffic:  2*M*D*sizeof(sum) bytes
# Split:    one program = BLOCK_D columns of a chunk of rows, BLOCK_R at a time


@triton.jit(do_not_specialize=["M", "tiles"])
def add_norm_bwd_reduce_kernel(
    total_ptr, dy_ptr, mean_ptr, rstd_ptr, part_dweight_ptr, part_dbias_ptr, M, D, tiles,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BLOCK_D)
    chunk = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs < D
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(tiles):
        rows, in_rows = rows_of(chunk * tiles + t, M, BLOCK_R)
        mean = tl.zeros((BLOCK_R,), tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        inside = in_rows[:, None] & in_d[None, :]
        at = rows[:, None] * D + offs[None, :]
        dy, n, _ = slope_of(total_ptr, dy_ptr, None, mean, rstd, at, offs, in_d, inside)
        dweight += tl.sum(dy * n, 0)
        dbias += tl.sum(dy, 0)
    at = chunk.to(tl.int64) * D + offs
    tl.store(part_dweight_ptr + at, dweight, mask=in_d)
    tl.store(part_dbias_ptr + at, dbias, mask=in_d)


# Computes: dweight and dbias from their parts
# Reads:    part_dweight, part_dbias [parts, D] fp32
# Writes:   dweight, dbias [D] fp32
# Traffic:  8*parts*D bytes
# Split:    one program = BLOCK_D columns; fp64 sums in a fixed order


@triton.jit(do_not_specialize=["parts", "D"])
def add_norm_bwd_merge_kernel(
    part_dweight_ptr, part_dbias_ptr, dweight_ptr, dbias_ptr, parts, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_D,), tl.float64)
    dbias = tl.zeros((BLOCK_D,), tl.float64)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & (offs < D)[None, :]
        at = p[:, None].to(tl.int64) * D + offs[None, :]
        dweight += tl.sum(tl.load(part_dweight_ptr + at, mask=inside, other=0.0).to(tl.float64), 0)
        dbias += tl.sum(tl.load(part_dbias_ptr + at, mask=inside, other=0.0).to(tl.float64), 0)
    tl.store(dweight_ptr + offs, dweight.to(tl.float32), mask=offs < D)
    tl.store(dbias_ptr + offs, dbias.to(tl.float32), mask=offs < D)
