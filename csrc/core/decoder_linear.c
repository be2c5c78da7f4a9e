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

/* Whether two works look at the same rows, and at a row in the same way once it is prepared. */
static int same_tokens(const bw_work *a, const bw_work *b) {
    const bw_linear *x = a->part->linear, *y = b->part->linear;
    if (a->x != b->x || a->rows != b->rows || a->tokens != b->tokens) return 0;
    if (x->kind != y->kind || x->mode != y->mode) return 0;
    return x->kind != BW_PACKED || !x->mode || bw_same_token(&a->few, &b->few);
}

static void prepare(bw_decoding *d, bw_work *work, ptrdiff_t x_stride) {
    const bw_linear *linear = work->part->linear;
    ptrdiff_t bytes = bw_whole_units(linear->cols) * 4;
    if (linear->kind == BW_PACKED) bytes = work->few.token_bytes;
    if (linear->kind == BW_TRELLIS) bytes = work->trellis.token_bytes;
    char *token = d->prepared + d->used_bytes;
    work->few.tokens = work->trellis.tokens = token;
    for (ptrdiff_t t = 0; t < work->tokens; t++, token += bytes) {
        const float *x = work->x + (work->rows ? work->rows[t] : t) * x_stride;
        if (linear->kind == BW_PACKED && work->few.digits) bw_cpu()->prepare_token(&work->few, x, token);
        else if (linear->kind == BW_TRELLIS && work->trellis.digits) bw_cpu()->trellis_token(&work->trellis, x, token);
        else memcpy(token, x, (size_t)bytes);
    }
    d->used_bytes += bw_aligned(work->tokens * bytes);
}

bw_work *bw_add_work(bw_decoding *d, const bw_part *part, const float *x, ptrdiff_t x_stride, const ptrdiff_t *rows,
                     ptrdiff_t tokens, float *out, ptrdiff_t out_stride) {
    enum { LOOKED_AT = 8 /* works that are not far behind may have prepared the same rows */ };
    bw_work *work = &d->works[d->n_works++], *source = work;
    const bw_linear *linear = part->linear;
    work->part = part;
    work->tokens = tokens;
    work->out = out;
    work->out_stride = out_stride;
    work->paired = work->pairs = 0;
    work->x = x;
    work->rows = rows;
    check_linear(linear, &work->layout, &work->trellis_layout); /* for the layouts: it was checked before */
    if (linear->kind == BW_PACKED) bw_describe_few(&linear->packed, &work->layout, linear->mode, &work->few);
    if (linear->kind == BW_TRELLIS) describe_trellis(linear, &work->trellis_layout, &work->trellis);
    for (int i = 0; i < LOOKED_AT && source > d->works; i++)
        if (same_tokens(--source, work)) {
            work->few.tokens = source->few.tokens;
            work->trellis.tokens = source->trellis.tokens;
            return work;
        }
    prepare(d, work, x_stride);
    return work;
}

void bw_add_mlp(bw_decoding *d, const bw_mlp *mlp, int pairs, const ptrdiff_t *rows, ptrdiff_t tokens, float *middle) {
    d->activated = 1;
    if (mlp->gate.linear) bw_add_work(d, &mlp->gate, d->x, d->hidden, rows, tokens, middle, d->inner)->paired = 1;
    bw_add_work(d, &mlp->up, d->x, d->hidden, rows, tokens, middle, d->inner)->pairs = pairs;
}

void bw_add_down(bw_decoding *d, const bw_mlp *mlp, ptrdiff_t tokens, float *middle, float *out) {
    ptrdiff_t n = mlp->down.linear->cols;
    for (ptrdiff_t t = 0; t < tokens; t++) /* a wider MLP may have been there before */
        memset(middle + t * d->inner + n, 0, (size_t)(bw_whole_units(n) - n) * 4);
    bw_add_work(d, &mlp->down, middle, d->inner, NULL, tokens, out, d->hidden);
}

static ptrdiff_t chunks_of(const bw_decoding *d, const bw_work *work) {
    return (work->part->rows - 1) / d->rows_per_chunk + 1;
}

ptrdiff_t bw_begin_works(bw_decoding *d) {
    ptrdiff_t rows = 0, chunks = 0;
    const bw_work *end = d->works + d->n_works;
    for (const bw_work *w = d->works; w < end; w += 1 + w->paired) rows += w->part->rows;
    ptrdiff_t each = (rows / (CHUNKS * d->n_workers) + SIDE - 1) / SIDE * SIDE;
    d->rows_per_chunk = each < SIDE ? SIDE : each;
    for (const bw_work *w = d->works; w < end; w += 1 + w->paired) chunks += chunks_of(d, w);
    return chunks;
}

static bw_status trellis_rows(const bw_work *work, ptrdiff_t row, ptrdiff_t n, float *sums) {
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
        bw_cpu()->trellis_multiply(&work->trellis, first / SIDE, work->tokens, steps, tile);
        for (ptrdiff_t t = 0; t < work->tokens; t++)
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
    if (linear->kind == BW_PACKED) status = bw_cpu()->multiply_rows(&work->few, at, n, work->tokens, scratch, sums);
    else if (linear->kind == BW_TRELLIS) status = trellis_rows(work, at, n, sums);
    else
        for (ptrdiff_t t = 0; t < work->tokens; t++)
            bw_cpu()->dense_rows(&linear->plain, at, n,
                                 (const float *)(work->few.tokens + t * bw_whole_units(linear->cols) * 4),
                                 sums + t * BW_FEW_ROWS);
    if (status) atomic_store(&d->status, status);
    if (linear->bias.data) bw_cpu()->load_row(&linear->bias, 0, at, n, bias);
    for (ptrdiff_t t = 0; t < work->tokens; t++) {
        float *row_sums = sums + t * BW_FEW_ROWS;
        if (linear->bias.data && linear->late_bias)
            bw_cpu()->round_row(row_sums, (n + 15) / 16 * 16, d->decoder->dtype);
        for (ptrdiff_t r = 0; linear->bias.data && r < n; r++) row_sums[r] += bias[r];
        for (ptrdiff_t r = n; r < (n + 15) / 16 * 16; r++) row_sums[r] = 0;
        bw_cpu()->round_row(row_sums, n, d->decoder->dtype);
    }
}

/* Sums of rows in turns to those of gates, in place, and those of ups; returns how many of each. */
static ptrdiff_t part_pairs(float *sums, float *up, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n / 2; i++) {
        up[i] = sums[2 * i + 1];
        sums[i] = sums[2 * i];
    }
    for (ptrdiff_t i = n / 2; i < (n / 2 + 15) / 16 * 16; i++) sums[i] = up[i] = 0;
    return n / 2;
}

static void activate(const bw_decoder *m, float *x, const float *up, ptrdiff_t n) {
    if (m->activation == BW_CLAMPED) bw_cpu()->clamped_row(x, up, n, m->alpha, m->limit, m->dtype);
    else bw_cpu()->activate_row(x, up, n, m->activation, m->dtype);
}

void bw_linear_chunk(bw_decoding *d, ptrdiff_t chunk, int worker) {
    const bw_work *work = d->works;
    char *scratch = d->scratch + worker * d->scratch_bytes;
    float sums[BW_MOST_STEP * BW_FEW_ROWS], up[BW_MOST_STEP * BW_FEW_ROWS];
    for (ptrdiff_t chunks; (chunks = chunks_of(d, work)) <= chunk; work += 1 + work->paired) chunk -= chunks;
    ptrdiff_t row = chunk * d->rows_per_chunk, end = bw_least(row + d->rows_per_chunk, work->part->rows);
    for (; row < end; row += BW_FEW_ROWS) {
        ptrdiff_t n = bw_least(end - row, BW_FEW_ROWS), kept = n;
        multiply(d, work, row, n, scratch, sums);
        if (work->paired) multiply(d, work + 1, row, n, scratch, up);
        for (ptrdiff_t t = 0; t < work->tokens; t++) {
            float *s = sums + t * BW_FEW_ROWS, *u = up + t * BW_FEW_ROWS;
            if (work->pairs) kept = part_pairs(s, u, n);
            if (d->activated) activate(d->decoder, s, work->paired || work->pairs ? u : NULL, kept);
            memcpy(work->out + t * work->out_stride + (work->pairs ? row / 2 : row), s, (size_t)kept * 4);
        }
    }
}
