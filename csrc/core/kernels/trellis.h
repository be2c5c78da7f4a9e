/* Trellis codes: the search of a tile's best path, and tiles back to numbers.
 *
 * A tile is 16 x 16 weights, one column after the other, in one sequence of 256 that bites its tail. Weight i has a
 * state of `width` bits: its own code of `rate` bits at the bottom, the codes before it above. A *group* is the
 * width - rate bits that a state hands on: s' = group << rate | code, and state s ends in group s mod 2^(width - rate).
 * So the states that end in one group differ only in their top bits, and those that start from one are neighbours.
 *
 * Costs are whole numbers of 16 bits, which saturate: a weight's is the square of the distance to its value, both in
 * units that bw_walk's caller chooses. Everything is exact, so that all sets find the same path. */

/* Distances are doubled so often at each rate before they are squared: the finer the code, the smaller the distances
 * that decide. */
static inline int n_doublings(int rate) {
    return rate > 3 ? rate - 3 : 0;
}

/* after[group] = the least cost of a path that ends there: that of its start, and of the weight x. */
static inline __attribute__((always_inline)) void step_path(const int16_t *values, int x, int width, int rate,
                                                            const uint16_t *before, uint16_t *after) {
    const ptrdiff_t groups = (ptrdiff_t)1 << (width - rate);
    bw_w16 target = bw_set16(x), least = bw_set16(-1);
    for (ptrdiff_t u = 0; u < groups; u += 32) {
        bw_w16 best = bw_set16(-1);
#pragma GCC unroll 32
        for (ptrdiff_t j = 0; j < 1 << rate; j++) {
            ptrdiff_t s = j * groups + u;
            bw_w16 d = bw_subs16(target, bw_load16(values + s));
            for (int i = 0; i < n_doublings(rate); i++) d = bw_adds16(d, d);
            best = bw_minu16(best, bw_addu16(bw_repeat16(before + (s >> rate), rate), bw_mul16(d, d)));
        }
        bw_store16(after + u, best);
        least = bw_minu16(least, best);
    }
    int lowest = bw_least16(least);
    if (lowest < 16384) return; /* still far from where costs saturate */
    for (ptrdiff_t u = 0; u < groups; u += 32) bw_store16(after + u, bw_sub16(bw_load16(after + u), bw_set16(lowest)));
}

static inline __attribute__((always_inline)) void walk_at(const bw_walk *w, int rate) {
    for (int i = 0; i < w->n; i++) {
        int at = (w->first + i) % BW_TRELLIS_TILE;
        step_path(w->values[w->columns[at]], w->x[at], w->width, rate, w->costs + i * w->stride,
                  w->costs + (i + 1) * w->stride);
    }
}

/* Costs of all groups after each of n weights, from those before the first. */
static void trellis_walk(const bw_walk *w) {
    switch (w->rate) {
    case 1: walk_at(w, 1); break;
    case 2: walk_at(w, 2); break;
    case 3: walk_at(w, 3); break;
    case 4: walk_at(w, 4); break;
    default: walk_at(w, 5);
    }
}

/* out = values of all states, times factor / 2^15. */
static void trellis_values(const int16_t *values, ptrdiff_t n, int factor, int16_t *out) {
    for (ptrdiff_t s = 0; s < n; s += 32) bw_store16(out + s, bw_mul16(bw_load16(values + s), bw_set16(factor)));
}

/* The bytes of a tile, with 16 legal ones before each column, and with the tile's last two before its first column:
 * windows there reach around its end. */
typedef struct {
    const uint8_t *p;
    uint8_t copy[16 + 2 * BW_TRELLIS_SIDE * BW_TRELLIS_MOST_RATE];
    uint8_t seam[16];
} open_tile;

static inline void open_trellis_tile(const uint8_t *tile, int rate, int at_start, open_tile *t) {
    int bytes = 2 * BW_TRELLIS_SIDE * rate, column = 2 * rate;
    t->p = tile;
    if (at_start) { /* nothing legal before it */
        memset(t->copy, 0, 16);
        memcpy(t->copy + 16, tile, (size_t)bytes);
        t->p = t->copy + 16;
    }
    memcpy(t->seam, t->p + column - 16, 16);
    memcpy(t->seam + 14 - column, t->p + bytes - 2, 2);
}

static inline bw_hash hash_tile_column(const open_tile *t, int c, int rate, const bw_windows *windows) {
    return bw_hash_column(c ? t->p + (c + 1) * 2 * rate : t->seam + 16, windows);
}

/* out + stride c = column c of 16 rows, times scales. */
static void trellis_decode(const uint8_t *codes, const uint8_t *rates, ptrdiff_t n_tiles, int width, int at_start,
                           const float *scales, float *out, ptrdiff_t stride) {
    bw_windows windows[BW_TRELLIS_MOST_RATE + 1];
    for (int r = 1; r <= BW_TRELLIS_MOST_RATE; r++) windows[r] = bw_read_windows(r, width);
    bw_vf scale = bw_load(scales);
    for (ptrdiff_t t = 0; t < n_tiles; t++) {
        open_tile tile;
        int rate = rates[t];
        open_trellis_tile(codes, rate, at_start && t == 0, &tile);
        for (int c = 0; c < BW_TRELLIS_SIDE; c++) {
            bw_hash hash = hash_tile_column(&tile, c, rate, &windows[rate]);
            bw_w32 n = bw_dot_hash(bw_set32(-BW_TRELLIS_MEAN), hash, bw_digit(1, 1, 0));
            bw_store(out, bw_mul(bw_float32(n), scale));
            out += stride;
        }
        codes += 2 * BW_TRELLIS_SIDE * rate;
    }
}

/* 16 rows, `stride` apart, of n columns of 16 numbers; n is a multiple of 16. */
static void transpose(const float *columns, ptrdiff_t n, float *rows, ptrdiff_t stride) {
    for (ptrdiff_t c = 0; c < n; c += BW_TRELLIS_SIDE) bw_transpose16(columns + c * BW_TRELLIS_SIDE, rows + c, stride);
}

/* A token rounded to whole numbers: one a column for each plane of digits, then for each cell of 64 columns a scale and
 * what its sums start from, since hashes are 510 too large. */
static void trellis_token(const bw_trellis_few *job, const float *x, char *token) {
    int planes = job->digits == 2 ? DIGIT_PLANES : 1;
    int32_t *numbers = (int32_t *)token, *starts = numbers + 2 * job->padded;
    float *scales = (float *)(starts + job->padded / UNIT);
    for (ptrdiff_t cell = 0; cell * UNIT < job->padded; cell++) {
        bw_vf whole[4];
        float n[UNIT];
        int32_t sum = 0;
        scales[cell] = round_cell(x + cell * UNIT, 4, job->digits, whole);
        for (int k = 0; k < 4; k++) bw_store(n + 16 * k, whole[k]);
        for (int i = 0; i < UNIT; i++) {
            sum += (int32_t)n[i];
            for (int p = 0; p < planes; p++)
                numbers[p * job->padded + cell * UNIT + i] = bw_digit((int32_t)n[i], job->digits, p);
        }
        starts[cell] = -BW_TRELLIS_MEAN * sum;
    }
}

/* Sums under way. Adding to a sum takes longer than hashing a column, so a token that is alone has CHAINS sums that
 * take turns: of whole numbers, which add up to the same in any order. */
enum { CHAINS = 3 };
typedef struct {
    bw_w32 dots[BW_TOKENS_AT_ONCE], lower[BW_TOKENS_AT_ONCE]; /* lower: where there are two planes of digits */
} open_sums;

/* sums += a column times a whole number of each token. */
static inline __attribute__((always_inline)) void add_column(bw_hash hash, int c, int chain, const int32_t *const *x,
                                                             ptrdiff_t padded, int n_tokens, int planes,
                                                             open_sums *sums) {
    for (int t = 0; t < n_tokens; t++) {
        int i = n_tokens == 1 ? chain : t;
        sums->dots[i] = bw_dot_hash(sums->dots[i], hash, x[t][c]);
        if (planes == 2) sums->lower[i] = bw_dot_hash(sums->lower[i], hash, x[t][c + padded]);
    }
}

/* The rate is known when this is compiled, so that columns lie at fixed distances and nothing but vector work is left
 * in the loop. The first column comes last: the bytes of its seam were just written in pieces, and to read them back at
 * once would wait for that. */
static inline __attribute__((always_inline)) void add_tile(const open_tile *tile, int rate, const bw_windows *windows,
                                                           const int32_t *const *x, ptrdiff_t padded, int n_tokens,
                                                           int planes, open_sums *sums) {
    const bw_windows w = windows[rate];
    for (int first = 1; first < BW_TRELLIS_SIDE; first += CHAINS)
#pragma GCC unroll 3
        for (int i = 0; i < CHAINS; i++) {
            int c = first + i;
            add_column(bw_hash_column(tile->p + (c + 1) * 2 * rate, &w), c, i, x, padded, n_tokens, planes, sums);
        }
    add_column(bw_hash_column(tile->seam + 16, &w), 0, 0, x, padded, n_tokens, planes, sums);
}

/* sums += tiles of one cell times tokens that are rounded. */
static inline __attribute__((always_inline)) const uint8_t *add_cell(const bw_trellis_few *job, const uint8_t *codes,
                                                                     ptrdiff_t cell, const bw_windows *windows,
                                                                     const char *const *tokens, int n_tokens,
                                                                     int digits, bw_vf *sums) {
    int planes = digits == 2 ? DIGIT_PLANES : 1;
    ptrdiff_t first = cell * 4, end = first + 4 < job->n_tiles ? first + 4 : job->n_tiles;
    const int n_sums = n_tokens == 1 ? CHAINS : n_tokens;
    open_sums open;
    for (int i = 0; i < n_sums; i++) {
        int32_t start = i < n_tokens ? ((const int32_t *)tokens[i])[2 * job->padded + cell] : 0;
        open.dots[i] = bw_set32(planes == 2 ? 0 : start);
        open.lower[i] = bw_set32(start);
    }
    for (ptrdiff_t k = first; k < end; k++) {
        open_tile tile;
        const int32_t *x[BW_TOKENS_AT_ONCE];
        int rate = job->rates[k];
        open_trellis_tile(codes, rate, codes == job->codes, &tile);
        for (int t = 0; t < n_tokens; t++) x[t] = (const int32_t *)tokens[t] + k * BW_TRELLIS_SIDE;
        switch (rate) {
        case 1: add_tile(&tile, 1, windows, x, job->padded, n_tokens, planes, &open); break;
        case 2: add_tile(&tile, 2, windows, x, job->padded, n_tokens, planes, &open); break;
        case 3: add_tile(&tile, 3, windows, x, job->padded, n_tokens, planes, &open); break;
        case 4: add_tile(&tile, 4, windows, x, job->padded, n_tokens, planes, &open); break;
        default: add_tile(&tile, 5, windows, x, job->padded, n_tokens, planes, &open);
        }
        codes += 2 * BW_TRELLIS_SIDE * rate;
    }
    for (int t = 0; t < n_tokens; t++) {
        const float *scales = (const float *)tokens[t] + 2 * job->padded + job->padded / UNIT;
        bw_w32 dots = open.dots[t], lower = open.lower[t];
        for (int i = n_tokens; i < n_sums; i++) {
            dots = bw_add32(dots, open.dots[i]);
            if (planes == 2) lower = bw_add32(lower, open.lower[i]);
        }
        bw_vf dot = bw_float32(planes == 2 ? bw_join32(dots, lower) : dots);
        sums[t] = bw_fma(dot, bw_set(scales[cell]), sums[t]);
    }
    return codes;
}

/* sums += one cell's tiles times tokens as they are. */
static inline __attribute__((always_inline)) const uint8_t *
add_cell_exactly(const bw_trellis_few *job, const uint8_t *codes, ptrdiff_t cell, const bw_windows *windows,
                 const char *const *tokens, int n_tokens, bw_vf *sums) {
    ptrdiff_t first = cell * 4, end = first + 4 < job->n_tiles ? first + 4 : job->n_tiles;
    for (ptrdiff_t k = first; k < end; k++) {
        open_tile tile;
        int rate = job->rates[k];
        const bw_windows w = windows[rate];
        open_trellis_tile(codes, rate, codes == job->codes, &tile);
        for (int c = 0; c < BW_TRELLIS_SIDE; c++) {
            bw_hash hash = hash_tile_column(&tile, c, rate, &w);
            bw_vf n = bw_float32(bw_dot_hash(bw_set32(-BW_TRELLIS_MEAN), hash, bw_digit(1, 1, 0)));
            for (int t = 0; t < n_tokens; t++) {
                float x = ((const float *)tokens[t])[k * BW_TRELLIS_SIDE + c];
                sums[t] = bw_add(sums[t], bw_mul(n, bw_set(x)));
            }
        }
        codes += 2 * BW_TRELLIS_SIDE * rate;
    }
    return codes;
}

static inline __attribute__((always_inline)) void multiply_trellis(const bw_trellis_few *job, ptrdiff_t row_tile,
                                                                   ptrdiff_t token, int n_tokens, int digits,
                                                                   const float *scales, float *out) {
    bw_windows windows[BW_TRELLIS_MOST_RATE + 1];
    const char *tokens[BW_TOKENS_AT_ONCE];
    bw_vf sums[BW_TOKENS_AT_ONCE];
    const uint8_t *codes = job->codes + row_tile * job->row_bytes;
    for (int r = 1; r <= BW_TRELLIS_MOST_RATE; r++) windows[r] = bw_read_windows(r, job->width);
    for (int t = 0; t < n_tokens; t++) {
        tokens[t] = job->tokens + (token + t) * job->token_bytes;
        sums[t] = bw_set(0);
    }
    for (ptrdiff_t cell = 0; cell * 4 < job->n_tiles; cell++)
        codes = digits ? add_cell(job, codes, cell, windows, tokens, n_tokens, digits, sums)
                       : add_cell_exactly(job, codes, cell, windows, tokens, n_tokens, sums);
    for (int t = 0; t < n_tokens; t++) bw_store(out + t * BW_TRELLIS_SIDE, bw_mul(sums[t], bw_load(scales)));
}

/* out (n_tokens, 16) = tokens times the 16 rows of a tile row. */
static void trellis_multiply(const bw_trellis_few *job, ptrdiff_t row_tile, ptrdiff_t n_tokens, const float *scales,
                             float *out) {
    ptrdiff_t t = 0;
    for (; t + 4 <= n_tokens; t += 4, out += 4 * BW_TRELLIS_SIDE) {
        if (job->digits == 0) multiply_trellis(job, row_tile, t, 4, 0, scales, out);
        else if (job->digits == 1) multiply_trellis(job, row_tile, t, 4, 1, scales, out);
        else multiply_trellis(job, row_tile, t, 4, 2, scales, out);
    }
    for (; t < n_tokens; t++, out += BW_TRELLIS_SIDE) {
        if (job->digits == 0) multiply_trellis(job, row_tile, t, 1, 0, scales, out);
        else if (job->digits == 1) multiply_trellis(job, row_tile, t, 1, 1, scales, out);
        else multiply_trellis(job, row_tile, t, 1, 2, scales, out);
    }
}
