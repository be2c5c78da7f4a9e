/* Products of stored rows with a few vectors ("tokens"), straight from the packed codes.
 *
 * Columns are taken 64 at a time, a *unit*. A *cell* is the part of a unit that shares one scale: a group, or the whole
 * unit where groups are larger. Lanes 4k .. 4k+3 of every sum belong to columns 16k .. 16k+15 of the unit, so that a
 * cell is a run of 4, 8 or 16 lanes.
 *
 * Exact:    y = sum over columns of ((q - z) s) x, all in fp32.
 * Digits:   each cell of x is first rounded to whole numbers n of one or two bytes with one scale t; then
 *           y = sum over cells of s t (sum q n - z sum n), where the inner sums are exact in integers.
 *
 * A token as prepared once a call:
 *   exact:   fp32, padded with zeros to whole units
 *   digits:  128 bytes of whole numbers a unit, in the order that suits the instruction set and the codes that they
 *            will meet; then, one fp32 a cell and padded with zeros to 16: the scales t; the sums of n */

enum {
    UNIT = 64,
    ROWS_AT_ONCE = BW_ROWS_AT_ONCE,
    TOKENS_AT_ONCE = BW_TOKENS_AT_ONCE,
    OUT_STRIDE = BW_FEW_ROWS,
    CACHE_LINE = 64
};

/* Whole numbers reach 127, or 127 * 256, so that the upper byte stays within 127 when the lower one is signed. */
static inline float largest_whole(int digits) {
    return digits == 1 ? 127.0f : 32512.0f;
}

/* How codes of a unit are read: by the instruction set's general way, as ternary ones, or, where it has more ways for
 * narrow codes, in the order of that number. */
enum { DENSE_CODES = 0, TERNARY_CODES = 1 };

#ifndef BW_NARROW
static int token_order(int bits) {
    (void)bits;
    return DENSE_CODES;
}
#endif

/* One cell of a token: whole numbers of its n vectors of 16 columns; their scale, NaN when a value is not finite. */
static inline float round_cell(const float *x, int n, int digits, bw_vf *whole) {
    bw_vf zero = bw_set(0), top = zero, poison = zero;
    for (int k = 0; k < n; k++) {
        bw_vf v = bw_load(x + 16 * k);
        top = bw_max(top, bw_max(v, bw_sub(zero, v)));
        poison = bw_add(poison, bw_mul(v, zero));
    }
    float limit = bw_reduce_max(top), bad = bw_sum(poison);
    int nothing = bad != bad || limit < 1e-30f; /* the inverse of less would overflow, and no sum would notice it */
    bw_vf inverse = bw_set(nothing ? 0 : largest_whole(digits) / limit);
    for (int k = 0; k < n; k++) whole[k] = nothing ? zero : bw_rint(bw_mul(bw_load(x + 16 * k), inverse));
    return nothing ? bad : limit / largest_whole(digits);
}

static void prepare_token(const bw_few *job, const float *x, char *token) {
    float *scales = (float *)(token + job->n_units * 2 * UNIT), *sums = scales + bw_padded_cells(job->n_cells);
    int vectors = 1 << (job->cell_shift - 4), cells = 4 / vectors;
    memset(scales, 0, (size_t)bw_padded_cells(job->n_cells) * 2 * sizeof(float));
    for (ptrdiff_t u = 0; u < job->n_units; u++, x += UNIT, token += 2 * UNIT) {
        bw_vf whole[4];
        for (int c = 0; c < cells; c++) {
            bw_vf *part = whole + c * vectors, sum = bw_set(0);
            float scale = round_cell(x + c * vectors * 16, vectors, job->digits, part);
            for (int k = 0; k < vectors; k++) sum = bw_add(sum, part[k]);
            if (u * cells + c >= job->n_cells) continue;
            scales[u * cells + c] = scale;
            sums[u * cells + c] = bw_sum(sum);
        }
        bw_store_digits(token, whole, job->digits, job->order);
    }
}

/* One row at work. Kernels read up to 64 bytes from where they stand; a row too near the end of its array is copied. */
typedef struct {
    const uint8_t *codes, *zeros;
    const uint16_t *scales;
} stored_row;

/* ROWS_AT_ONCE rows at work; rows past the end repeat the last one. Arrays of cells are `stride` apart and may be read
 * 16 past their end. */
typedef struct {
    stored_row rows[ROWS_AT_ONCE];
    float *scales; /* digits: (TOKENS_AT_ONCE, ROWS_AT_ONCE, cells), times the token's; exact: (ROWS_AT_ONCE, cells) */
    float *zeros;  /* exact: (ROWS_AT_ONCE, cells) */
    ptrdiff_t stride;
    ptrdiff_t ahead;        /* bytes of codes to those that are fetched meanwhile, 0 at the end */
    bw_reader reader;       /* of dense codes of this width */
    bw_vf smallest, poison; /* of all scales so far; poison turns NaN when one is not finite */
} row_block;

/* Bytes first .. first+n-1 of an array of `total` bytes, with something legal to read up to first+reach: codes 0,
 * or scales 0x0101. */
static inline const void *readable(const void *array, ptrdiff_t first, ptrdiff_t n, ptrdiff_t reach, ptrdiff_t total,
                                   int filler, char *copy) {
    const char *p = (const char *)array + first;
    if (first + reach <= total) return p;
    memcpy(copy, p, (size_t)n);
    memset(copy + n, filler, (size_t)(reach - n));
    return copy;
}

static inline void open_rows(const bw_few *job, ptrdiff_t row, char *copies, row_block *b) {
    const bw_quantized *w = job->weight;
    const bw_layout *l = job->layout;
    if (row + ROWS_AT_ONCE <= job->direct_rows) {
        for (int r = 0; r < ROWS_AT_ONCE; r++)
            b->rows[r] = (stored_row){w->codes + (row + r) * l->row_bytes,
                                      w->scheme.symmetric ? NULL : w->zeros + (row + r) * l->row_zero_bytes,
                                      w->scales + (row + r) * l->n_groups};
        return;
    }
    for (int r = 0; r < ROWS_AT_ONCE; r++, copies += job->reach + job->scale_reach + job->zero_reach) {
        ptrdiff_t at = row + r < w->rows ? row + r : w->rows - 1, scale_bytes = l->n_groups * 2;
        stored_row *p = &b->rows[r];
        p->codes = readable(w->codes, at * l->row_bytes, l->row_bytes, job->reach, w->rows * l->row_bytes, 0, copies);
        p->scales = readable(w->scales, at * scale_bytes, scale_bytes, job->scale_reach, w->rows * scale_bytes, 1,
                             copies + job->reach);
        if (w->scheme.symmetric) continue;
        p->zeros = readable(w->zeros, at * l->row_zero_bytes, l->row_zero_bytes, job->zero_reach,
                            w->rows * l->row_zero_bytes, 0, copies + job->reach + job->scale_reach);
    }
}

static inline void fetch(const void *array, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += CACHE_LINE) __builtin_prefetch((const char *)array + i, 0, 2);
}

/* Rows are short for the machine to see a stream in each, so it is told what is due next: scales and zeros now, codes
 * along the way, `ahead` bytes before they are read. Into the second cache: the first has room for fewer misses at once
 * than the memory's speed takes. Measured: 11008 x 4096 of 4 bits in .55 of the time. */
static inline void look_ahead(const bw_few *job, ptrdiff_t row, row_block *b) {
    const bw_quantized *w = job->weight;
    const bw_layout *l = job->layout;
    ptrdiff_t n = job->rows_ahead;
    b->ahead = row + n + ROWS_AT_ONCE <= w->rows ? n * l->row_bytes : 0;
    if (!b->ahead) return;
    fetch(w->scales + (row + n) * l->n_groups, ROWS_AT_ONCE * l->n_groups * 2);
    if (!w->scheme.symmetric) fetch(w->zeros + (row + n) * l->row_zero_bytes, ROWS_AT_ONCE * l->row_zero_bytes);
}

/* How to find scales and zeros of cells c .. c+15 in a row. `wider`: groups are larger than cells. */
typedef struct {
    int wider, symmetric, shift, bits;
    float zero;
    const int32_t *units;
} cell_finder;

static inline cell_finder find_cells(const bw_few *job) {
    return (cell_finder){job->group_shift > job->cell_shift,
                         job->weight->scheme.symmetric,
                         job->group_shift,
                         job->bits,
                         job->zero,
                         job->units};
}

static inline bw_vf cell_scales(const cell_finder *f, const stored_row *row, ptrdiff_t c) {
    if (f->wider) return bw_spread(bw_load_f16(row->scales + (c * UNIT >> f->shift)), f->units);
    return bw_load_f16(row->scales + c);
}

static inline bw_vf cell_zeros(const cell_finder *f, const bw_reader *reader, const stored_row *row, ptrdiff_t c) {
    if (f->symmetric) return bw_set(f->zero);
    ptrdiff_t g = f->wider ? c * UNIT >> f->shift : c; /* a multiple of 8 */
    bw_span span = bw_open_dense(row->zeros + g / 8 * f->bits, reader);
    bw_vf zeros = bw_code_floats(bw_take_dense(&span, reader), 0);
    return f->wider ? bw_spread(zeros, f->units) : zeros;
}

/* Scales of the rows times scales of the tokens, and the part of the sums that zeros take: - s t z (sum of n). */
static inline __attribute__((always_inline)) void start_digits(const bw_few *job, row_block *b,
                                                               const char *const *tokens, int n_tokens, bw_vf *sums) {
    ptrdiff_t whole_numbers = job->n_units * 2 * UNIT, n_cells = job->n_cells, stride = b->stride;
    const cell_finder finder = find_cells(job);
    const bw_reader reader = b->reader;
    float *scales = b->scales;
    bw_vf smallest = b->smallest, poison = b->poison, nothing = bw_set(0);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        const stored_row row = b->rows[r];
        for (ptrdiff_t c = 0; c < n_cells; c += 16) {
            bw_vf scale = cell_scales(&finder, &row, c), zero = cell_zeros(&finder, &reader, &row, c);
            smallest = bw_min(smallest, scale);
            poison = bw_add(poison, bw_mul(scale, nothing));
#pragma GCC unroll 4
            for (int t = 0; t < n_tokens; t++) {
                const float *token = (const float *)(tokens[t] + whole_numbers) + c;
                int i = t * ROWS_AT_ONCE + r;
                bw_vf product = bw_mul(scale, bw_load(token));
                bw_store(scales + i * stride + c, product);
                sums[i] = bw_sub(sums[i], bw_mul(bw_mul(zero, product), bw_load(token + bw_padded_cells(n_cells))));
            }
        }
    }
    b->smallest = smallest;
    b->poison = poison;
}

static inline void start_exact(const bw_few *job, row_block *b) {
    const cell_finder finder = find_cells(job);
    for (int r = 0; r < ROWS_AT_ONCE; r++)
        for (ptrdiff_t c = 0; c < job->n_cells; c += 16) {
            bw_vf scale = cell_scales(&finder, &b->rows[r], c);
            b->smallest = bw_min(b->smallest, scale);
            b->poison = bw_add(b->poison, bw_mul(scale, bw_set(0)));
            bw_store(b->scales + r * b->stride + c, scale);
            bw_store(b->zeros + r * b->stride + c, cell_zeros(&finder, &b->reader, &b->rows[r], c));
        }
}

/* sums[t * ROWS_AT_ONCE] += one unit of row r times n_tokens tokens. `digits` 0 is exact; `wide`: a cell is a unit. */
static inline __attribute__((always_inline)) void add_unit(const bw_few *job, const row_block *b, int r, bw_codes codes,
                                                           const char *const *tokens, ptrdiff_t unit, int n_tokens,
                                                           int digits, int coding, int wide, bw_vf *sums) {
    ptrdiff_t cell = wide ? unit : unit * UNIT >> job->cell_shift;
    for (int t = 0; digits && t < n_tokens; t++) {
        const float *scale = b->scales + (t * ROWS_AT_ONCE + r) * b->stride + cell;
        const char *whole = tokens[t] + unit * 2 * UNIT;
        bw_vf *sum = sums + t * ROWS_AT_ONCE;
#ifdef BW_NARROW
        if (coding > TERNARY_CODES) {
            if (wide) *sum = bw_add_narrow(*sum, codes, whole, digits, *scale);
            else *sum = bw_fma(bw_dot_narrow(codes, whole, digits), bw_spread(bw_load(scale), job->lanes), *sum);
            continue;
        }
#endif
        bw_vf dot = bw_dot(codes, whole, digits);
        *sum = bw_fma(dot, wide ? bw_set(*scale) : bw_spread(bw_load(scale), job->lanes), *sum);
    }
    (void)coding;
    for (int k = 0; !digits && k < 4; k++) {
        ptrdiff_t at = r * b->stride + cell + (wide ? 0 : job->lanes[4 * k]);
        bw_vf weight = bw_mul(bw_sub(bw_code_floats(codes, k), bw_set(b->zeros[at])), bw_set(b->scales[at]));
        for (int t = 0; t < n_tokens; t++) {
            bw_vf x = bw_load((const float *)tokens[t] + unit * UNIT + 16 * k);
            sums[t * ROWS_AT_ONCE] = bw_fma(weight, x, sums[t * ROWS_AT_ONCE]);
        }
    }
}

static inline bw_codes take_codes(const bw_span *span, int k, const bw_reader *reader, int coding) {
    if (coding == TERNARY_CODES) return bw_take_ternary(span, k, reader);
#ifdef BW_NARROW
    if (coding) return bw_take_narrow(span, coding);
#endif
    return bw_take_dense(span, reader);
}

/* Sets with registers for a unit compile the main loop for each case; those in plain C share one. */
#ifdef BW_PLAIN_UNITS
#ifdef __clang__ /* which never clones */
#define BW_EACH_CASE static __attribute__((noinline))
#else
#define BW_EACH_CASE static __attribute__((noinline, noclone))
#endif
#else
#define BW_EACH_CASE static inline __attribute__((always_inline))
#endif

/* out (n_tokens rows of OUT_STRIDE) = the block times tokens. */
BW_EACH_CASE void multiply_block(const bw_few *job, row_block *b, ptrdiff_t token, int n_tokens, int digits, int coding,
                                 int wide, float *out) {
    int ternary = coding == TERNARY_CODES;
    const char *tokens[TOKENS_AT_ONCE];
    bw_vf sums[ROWS_AT_ONCE * TOKENS_AT_ONCE];
    for (int t = 0; t < n_tokens; t++) tokens[t] = job->tokens + (token + t) * job->token_bytes;
    for (int i = 0; i < ROWS_AT_ONCE * n_tokens; i++) sums[i] = bw_set(0);
    if (digits) start_digits(job, b, tokens, n_tokens, sums);
    else start_exact(job, b);
    bw_reader reader = ternary ? bw_read_ternary() : b->reader;
    ptrdiff_t units = ternary ? 5 : 1, bytes = ternary ? UNIT : 8 * job->bits, at = 0;
    for (ptrdiff_t first = 0; first < job->n_units; first += units, at += bytes) {
        bw_span spans[ROWS_AT_ONCE];
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            const uint8_t *codes = b->rows[r].codes + at;
            __builtin_prefetch(codes + b->ahead, 0, 2);
            spans[r] = ternary ? bw_open_ternary(codes) : bw_open_dense(codes, &reader);
        }
        for (int k = 0; k < units && first + k < job->n_units; k++)
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                bw_codes codes = take_codes(&spans[r], k, &reader, coding);
                add_unit(job, b, r, codes, tokens, first + k, n_tokens, digits, coding, wide, sums + r);
            }
    }
    for (int t = 0; t < n_tokens; t++) bw_sum_four(sums + t * ROWS_AT_ONCE, out + t * OUT_STRIDE);
}

#undef BW_EACH_CASE

/* The loop above for one or four tokens, zero to two digits, all codings, both widths of a cell. */
static inline __attribute__((always_inline)) void choose_digits(const bw_few *job, row_block *b, ptrdiff_t token,
                                                                int n_tokens, int coding, int wide, float *out) {
    if (job->digits == 1) multiply_block(job, b, token, n_tokens, 1, coding, wide, out);
    else if (job->digits == 2) multiply_block(job, b, token, n_tokens, 2, coding, wide, out);
    else if (coding <= TERNARY_CODES) multiply_block(job, b, token, n_tokens, 0, coding, wide, out);
}

static inline __attribute__((always_inline)) void choose_width(const bw_few *job, row_block *b, ptrdiff_t token,
                                                               int n_tokens, int coding, float *out) {
    if (job->cell_shift == 6) choose_digits(job, b, token, n_tokens, coding, 1, out);
    else choose_digits(job, b, token, n_tokens, coding, 0, out);
}

static inline __attribute__((always_inline)) void choose_coding(const bw_few *job, row_block *b, ptrdiff_t token,
                                                                int n_tokens, float *out) {
    if (job->weight->scheme.levels == 3) choose_width(job, b, token, n_tokens, TERNARY_CODES, out);
#ifdef BW_NARROW
    else if (job->order == 2) choose_width(job, b, token, n_tokens, 2, out);
    else if (job->order == 3) choose_width(job, b, token, n_tokens, 3, out);
    else if (job->order == 4) choose_width(job, b, token, n_tokens, 4, out);
#endif
    else choose_width(job, b, token, n_tokens, DENSE_CODES, out);
}

static void multiply_four(const bw_few *job, row_block *b, ptrdiff_t token, float *out) {
    choose_coding(job, b, token, 4, out);
}

static void multiply_one(const bw_few *job, row_block *b, ptrdiff_t token, float *out) {
    choose_coding(job, b, token, 1, out);
}

/* out (n_tokens rows of OUT_STRIDE) = tokens times n <= OUT_STRIDE rows from `row` on. */
static bw_status multiply_rows(const bw_few *job, ptrdiff_t row, ptrdiff_t n, ptrdiff_t n_tokens, char *scratch,
                               float *out) {
    row_block b = {.scales = (float *)scratch, .stride = bw_padded_cells(job->n_cells) + 16};
    b.zeros = b.scales + ROWS_AT_ONCE * b.stride;
    b.reader = bw_read_dense(job->bits);
    b.smallest = bw_set(1);
    b.poison = bw_set(0);
    char *copies = (char *)(b.scales + ROWS_AT_ONCE * TOKENS_AT_ONCE * b.stride);
    for (ptrdiff_t first = 0; first < n; first += ROWS_AT_ONCE) {
        open_rows(job, row + first, copies, &b);
        look_ahead(job, row + first, &b);
        ptrdiff_t token = 0;
        for (; token + 4 <= n_tokens; token += 4) multiply_four(job, &b, token, out + token * OUT_STRIDE + first);
        for (; token < n_tokens; token++) multiply_one(job, &b, token, out + token * OUT_STRIDE + first);
    }
    return bw_reduce_min(b.smallest) > 0 && bw_sum(b.poison) == 0 ? BW_OK : BW_ERR_SCALE;
}
