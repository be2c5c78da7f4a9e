/* Linear layers of a decoder's step. */
#include <string.h>

#include "alloc.h"
#include "codec/trellis.h"
#include "cpu.h"
#include "decoder.h"
#include "float16.h"
#include "matmul.h"
#include "scheme.h"

enum { CHUNKS = 6 /* for each thread */, SIDE = BW_TRELLIS_SIDE };

static void describe_trellis(const bw_linear *linear, const bw_trellis_layout *layout, bw_trellis_few *few) {
    ptrdiff_t padded = bw_whole_units(linear->cols);
    *few = (bw_trellis_few){.codes = linear->trellis.codes,
                            .rates = linear->trellis.rates,
                            .n_tiles = layout->col_tiles,
                            .row_bytes = layout->row_bytes,
                            .padded = padded,
                            .width = linear->trellis.width,
                            .digits = (int)linear->mode};
    few->token_bytes = bw_aligned(few->digits ? padded * 8 + padded / BW_UNIT * 8 : padded * 4);
}

static bw_status check_linear(const bw_linear *linear, bw_layout *layout, bw_trellis_layout *trellis_layout) {
    ptrdiff_t rows = 0, cols = 0;
    bw_status status = BW_ERR_ARGUMENT;
    if (linear->kind == BW_PACKED) {
        status = bw_check_quantized(&linear->packed, layout);
        rows = linear->packed.rows, cols = linear->packed.cols;
    } else if (linear->kind == BW_TRELLIS) {
        status = bw_check_trellis(&linear->trellis, trellis_layout);
        rows = linear->trellis.rows, cols = linear->trellis.cols;
    } else if (linear->kind == BW_PLAIN) {
        status = bw_check_matrix(&linear->plain);
        rows = linear->plain.rows, cols = linear->plain.cols;
        if (!status && linear->plain.col_stride != 1) status = BW_ERR_ARGUMENT;
    }
    if (status) return status;
    if (linear->mode != BW_EXACT && linear->mode != BW_INT8 && linear->mode != BW_INT16) return BW_ERR_ARGUMENT;
    if (rows != linear->rows || cols != linear->cols || rows < 1 || cols < 1) return BW_ERR_SHAPE;
    if (linear->bias.data && (status = bw_check_matrix(&linear->bias))) return status;
    return linear->bias.data && (linear->bias.rows != 1 || linear->bias.cols != rows) ? BW_ERR_SHAPE : BW_OK;
}

bw_status bw_linear_needs(const bw_linear *linear, ptrdiff_t *scratch, ptrdiff_t *token) {
    bw_layout layout;
    bw_trellis_layout trellis_layout;
    bw_few few;
    bw_trellis_few trellis;
    bw_status status = check_linear(linear, &layout, &trellis_layout);
    if (status) return status;
    *scratch = 0;
    *token = bw_whole_units(linear->cols) * 4;
    if (linear->kind == BW_PACKED) {
        *scratch = bw_describe_few(&linear->packed, &layout, linear->mode, &few);
        *token = few.token_bytes;
    } else if (linear->kind == BW_TRELLIS) {
        describe_trellis(linear, &trellis_layout, &trellis);
        *token = trellis.token_bytes;
    }
    return BW_OK;
}

/* Whether two layers look at a token in the same way once it is prepared. */
static int same_tokens(const bw_work *a, const bw_work *b) {
    const bw_linear *x = a->part->linear, *y = b->part->linear;
    if (x->kind != y->kind || x->mode != y->mode || x->kind == BW_PLAIN) return 0;
    return x->kind == BW_TRELLIS || !x->mode || bw_same_token(&a->few, &b->few);
}

static void prepare(bw_decoding *d, bw_work *work, char *tokens, const float *x, ptrdiff_t x_stride) {
    const bw_linear *linear = work->part->linear;
    for (ptrdiff_t t = 0; t < d->tokens; t++, x += x_stride) {
        if (linear->kind == BW_PACKED) {
            char *token = tokens + t * work->few.token_bytes;
            if (work->few.digits) bw_cpu()->prepare_token(&work->few, x, token);
            else memcpy(token, x, (size_t)work->few.token_bytes);
        } else if (linear->kind == BW_TRELLIS) {
            char *token = tokens + t * work->trellis.token_bytes;
            if (work->trellis.digits) bw_cpu()->trellis_token(&work->trellis, x, token);
            else memcpy(token, x, (size_t)work->trellis.token_bytes);
        } else memcpy(tokens + t * bw_whole_units(linear->cols) * 4, x, (size_t)bw_whole_units(linear->cols) * 4);
    }
    work->few.tokens = work->trellis.tokens = tokens;
}

ptrdiff_t bw_begin_linear(bw_decoding *d, const bw_part *const *parts, float *const *outs, const ptrdiff_t *strides,
                          int n, int gated, const float *x, ptrdiff_t x_stride) {
    ptrdiff_t rows = 0;
    d->n_works = n;
    d->gated = gated;
    for (int i = 0; i < n; i++) {
        bw_work *work = &d->works[i];
        const bw_linear *linear = parts[i]->linear;
        work->part = parts[i];
        work->out = outs[i];
        work->out_stride = strides[i];
        check_linear(linear, &work->layout, &work->trellis_layout); /* for the layouts: it was checked before */
        if (linear->kind == BW_PACKED) bw_describe_few(&linear->packed, &work->layout, linear->mode, &work->few);
        if (linear->kind == BW_TRELLIS) describe_trellis(linear, &work->trellis_layout, &work->trellis);
        int source = 0;
        while (source < i && !same_tokens(&d->works[source], work)) source++;
        if (source < i) {
            work->few.tokens = d->works[source].few.tokens;
            work->trellis.tokens = d->works[source].trellis.tokens;
        } else prepare(d, work, d->prepared + i * d->prepared_bytes, x, x_stride);
        if (!gated || !i) rows += parts[i]->rows;
    }
    ptrdiff_t each = (rows / (CHUNKS * d->n_workers) + SIDE - 1) / SIDE * SIDE;
    d->rows_per_chunk = each < SIDE ? SIDE : each;
    ptrdiff_t chunks = 0;
    for (int i = 0; i < (gated ? 1 : n); i++) chunks += (parts[i]->rows - 1) / d->rows_per_chunk + 1;
    return chunks;
}

static bw_status trellis_rows(const bw_decoding *d, const bw_work *work, ptrdiff_t row, ptrdiff_t n, float *sums) {
    const bw_trellis *w = &work->part->linear->trellis;
    float steps[SIDE], tile[BW_MOST_STEP * SIDE];
    bw_status status = BW_OK;
    while (n > 0) { /* by tiles, of which the part may take a piece */
        ptrdiff_t first = row / SIDE * SIDE, from = row - first, take = bw_least(SIDE - from, n);
        for (ptrdiff_t r = 0; r < SIDE; r++) {
            float scale = first + r < w->rows ? bw_from_f16(w->scales[first + r]) : 1;
            if (!(scale > 0) || scale > 65504) status = BW_ERR_SCALE;
            steps[r] = scale * BW_TRELLIS_STEP;
        }
        bw_cpu()->trellis_multiply(&work->trellis, first / SIDE, d->tokens, steps, tile);
        for (ptrdiff_t t = 0; t < d->tokens; t++)
            memcpy(sums + t * BW_FEW_ROWS, tile + t * SIDE + from, (size_t)take * 4);
        row += take, sums += take, n -= take;
    }
    return status;
}

/* sums (tokens, BW_FEW_ROWS) = rows `row` .. row+n-1 of a part, counted from its first, with the bias, rounded. */
static void multiply(bw_decoding *d, const bw_work *work, ptrdiff_t row, ptrdiff_t n, char *scratch, float *sums) {
    const bw_linear *linear = work->part->linear;
    float bias[BW_FEW_ROWS];
    bw_status status = BW_OK;
    ptrdiff_t at = work->part->first + row;
    if (linear->kind == BW_PACKED) status = bw_cpu()->multiply_rows(&work->few, at, n, d->tokens, scratch, sums);
    else if (linear->kind == BW_TRELLIS) status = trellis_rows(d, work, at, n, sums);
    else
        for (ptrdiff_t t = 0; t < d->tokens; t++)
            bw_cpu()->dense_rows(&linear->plain, at, n,
                                 (const float *)(work->few.tokens + t * bw_whole_units(linear->cols) * 4),
                                 sums + t * BW_FEW_ROWS);
    if (status) atomic_store(&d->status, status);
    if (linear->bias.data) bw_cpu()->load_row(&linear->bias, 0, at, n, bias);
    for (ptrdiff_t t = 0; t < d->tokens; t++) {
        float *row_sums = sums + t * BW_FEW_ROWS;
        for (ptrdiff_t r = 0; linear->bias.data && r < n; r++) row_sums[r] += bias[r];
        for (ptrdiff_t r = n; r < (n + 15) / 16 * 16; r++) row_sums[r] = 0;
        bw_cpu()->round_row(row_sums, n, d->decoder->dtype);
    }
}

void bw_linear_chunk(bw_decoding *d, ptrdiff_t chunk, int worker) {
    const bw_work *work = d->works;
    char *scratch = d->scratch + worker * d->scratch_bytes;
    float sums[BW_MOST_STEP * BW_FEW_ROWS], up[BW_MOST_STEP * BW_FEW_ROWS];
    for (; !d->gated; work++) {
        ptrdiff_t chunks = (work->part->rows - 1) / d->rows_per_chunk + 1;
        if (chunk < chunks) break;
        chunk -= chunks;
    }
    ptrdiff_t row = chunk * d->rows_per_chunk, end = bw_least(row + d->rows_per_chunk, work->part->rows);
    for (; row < end; row += BW_FEW_ROWS) {
        ptrdiff_t n = bw_least(end - row, BW_FEW_ROWS);
        multiply(d, work, row, n, scratch, sums);
        if (d->gated && d->n_works > 1) multiply(d, work + 1, row, n, scratch, up);
        for (ptrdiff_t t = 0; t < d->tokens; t++) {
            float *s = sums + t * BW_FEW_ROWS, *u = d->n_works > 1 ? up + t * BW_FEW_ROWS : NULL;
            if (d->gated) bw_cpu()->activate_row(s, u, n, d->decoder->activation, d->decoder->dtype);
            memcpy(work->out + t * work->out_stride + row, s, (size_t)n * 4);
        }
    }
}
