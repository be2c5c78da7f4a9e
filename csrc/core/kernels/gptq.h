/* GPTQ and refinement on a tile: 64 rows, one lane each, times the columns of one block. Values of one column lie
 * together, so that every row is rounded at once and feedback is one product per earlier column. */

enum { TILE_VECTORS = BW_TILE_ROWS / 16 };

/* sums += sum over j < n of values[j] * factors[j * step], one vector of rows at a time. Two chains each, to keep the
 * multipliers busy. */
static inline void add_products(const float *values, const float *factors, ptrdiff_t step, ptrdiff_t n, bw_vf *sums) {
    bw_vf even[TILE_VECTORS], odd[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; v++) {
        even[v] = sums[v];
        odd[v] = bw_set(0);
    }
    ptrdiff_t j = 0;
    for (; j + 2 <= n; j += 2, values += 2 * BW_TILE_ROWS) {
        bw_vf first = bw_set(factors[j * step]), second = bw_set(factors[(j + 1) * step]);
        for (int v = 0; v < TILE_VECTORS; v++) even[v] = bw_fma(bw_load(values + 16 * v), first, even[v]);
        for (int v = 0; v < TILE_VECTORS; v++) odd[v] = bw_fma(bw_load(values + BW_TILE_ROWS + 16 * v), second, odd[v]);
    }
    if (j < n) {
        bw_vf last = bw_set(factors[j * step]);
        for (int v = 0; v < TILE_VECTORS; v++) even[v] = bw_fma(bw_load(values + 16 * v), last, even[v]);
    }
    for (int v = 0; v < TILE_VECTORS; v++) sums[v] = bw_add(even[v], odd[v]);
}

static inline void load_tile(const float *column, bw_vf *x) {
    for (int v = 0; v < TILE_VECTORS; v++) x[v] = bw_load(column + 16 * v);
}

/* Rounds column after column, each with the feedback of those before. codes NULL: errors and costs only. */
static inline void round_columns(const bw_tile *t, const bw_tile_grid *grid, float *errors, uint8_t *codes,
                                 float *costs) {
    bw_vf bottom = bw_set(0), top = bw_set(t->top), x[TILE_VECTORS], cost[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; v++) cost[v] = bw_set(0);
    for (ptrdiff_t k = 0; k < t->n; k++) {
        bw_vf variance = bw_set(t->variance[k]);
        load_tile(t->base + k * BW_TILE_ROWS, x);
        add_products(errors, t->feedback + k * t->stride, 1, k, x);
        for (int v = 0; v < TILE_VECTORS; v++) {
            ptrdiff_t at = k * BW_TILE_ROWS + 16 * v;
            bw_vf zero = bw_load(grid->zeros + 16 * v);
            bw_vf q = bw_add(bw_mul(x[v], bw_load(grid->inverses + 16 * v)), zero);
            q = bw_min(bw_max(bw_rint(q), bottom), top);
            bw_vf value = bw_mul(bw_sub(q, zero), bw_load(grid->scales + 16 * v)), miss = bw_sub(x[v], value);
            cost[v] = bw_fma(bw_mul(miss, miss), variance, cost[v]);
            bw_store(errors + at, bw_sub(bw_load(t->weight + at), value));
            if (codes) bw_store_u8(codes + at, q);
        }
    }
    for (int v = 0; v < TILE_VECTORS; v++) bw_store(costs + 16 * v, cost[v]);
}

/* As fp16 holds it, within what a scale may be; NaN becomes the smallest. */
static inline bw_vf round_scale(bw_vf scale) {
    uint16_t half[16];
    bw_store_f16(half, bw_min(bw_max(scale, bw_set(0x1p-24f)), bw_set(65504.0f)));
    return bw_load_f16(half);
}

/* The grid with its steps times `ratio`, as fp16 holds them, and its zeros moved by `shift`. */
static inline void vary_grid(const bw_tile *t, const bw_tile_grid *from, float ratio, float shift, bw_tile_grid *to) {
    for (int v = 0; v < TILE_VECTORS; v++) {
        bw_vf scale = round_scale(bw_mul(bw_load(from->scales + 16 * v), bw_set(ratio)));
        bw_store(to->scales + 16 * v, scale);
        bw_store(to->inverses + 16 * v, bw_div(bw_set(1), scale));
        bw_vf zero = bw_load(from->zeros + 16 * v);
        if (shift != 0) zero = bw_min(bw_max(bw_add(zero, bw_set(shift)), bw_set(0)), bw_set(t->top));
        bw_store(to->zeros + 16 * v, zero);
    }
}

static inline void keep_grid(bw_vf new, bw_vf old, const bw_tile_grid *trial, bw_tile_grid *grid, int i) {
    bw_store(grid->scales + i, bw_select_less(new, old, bw_load(trial->scales + i), bw_load(grid->scales + i)));
    bw_store(grid->inverses + i, bw_select_less(new, old, bw_load(trial->inverses + i), bw_load(grid->inverses + i)));
    bw_store(grid->zeros + i, bw_select_less(new, old, bw_load(trial->zeros + i), bw_load(grid->zeros + i)));
}

static void tile_round(const bw_tile *t, const bw_tile_grid *grid, float *errors, uint8_t *codes, float *costs) {
    round_columns(t, grid, errors, codes, costs);
}

static void tile_try(const bw_tile *t, const bw_tile_grid *start, float ratio, float shift, float *errors,
                     bw_tile_grid *best, float *best_costs) {
    bw_tile_grid grid;
    float costs[BW_TILE_ROWS];
    vary_grid(t, start, ratio, shift, &grid);
    round_columns(t, &grid, errors, NULL, costs);
    for (int i = 0; i < BW_TILE_ROWS; i += 16) {
        bw_vf cost = bw_load(costs + i), least = bw_load(best_costs + i);
        keep_grid(cost, least, &grid, best, i);
        bw_store(best_costs + i, bw_min(cost, least));
    }
}

/* Takes over the trial in the rows where it costs less. */
static void tile_keep(ptrdiff_t n, const float *before, const float *after, const bw_tile_grid *trial,
                      const float *trial_errors, const uint8_t *trial_codes, bw_tile_grid *grid, float *errors,
                      uint8_t *codes) {
    for (int i = 0; i < BW_TILE_ROWS; i += 16) {
        bw_vf old = bw_load(before + i), new = bw_load(after + i);
        keep_grid(new, old, trial, grid, i);
        for (ptrdiff_t at = i; at < n * BW_TILE_ROWS; at += BW_TILE_ROWS) {
            bw_store(errors + at, bw_select_less(new, old, bw_load(trial_errors + at), bw_load(errors + at)));
            bw_store_u8(codes + at, bw_select_less(new, old, bw_load_u8(trial_codes + at), bw_load_u8(codes + at)));
        }
    }
}

/* What round_columns would have counted for errors that are given. */
static void tile_cost(const bw_tile *t, const float *errors, float *costs) {
    bw_vf x[TILE_VECTORS], cost[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; v++) cost[v] = bw_set(0);
    for (ptrdiff_t k = 0; k < t->n; k++) {
        bw_vf variance = bw_set(t->variance[k]);
        load_tile(t->base + k * BW_TILE_ROWS, x);
        add_products(errors, t->feedback + k * t->stride, 1, k, x);
        for (int v = 0; v < TILE_VECTORS; v++) {
            ptrdiff_t at = k * BW_TILE_ROWS + 16 * v;
            bw_vf value = bw_sub(bw_load(t->weight + at), bw_load(errors + at)), miss = bw_sub(x[v], value);
            cost[v] = bw_fma(bw_mul(miss, miss), variance, cost[v]);
        }
    }
    for (int v = 0; v < TILE_VECTORS; v++) bw_store(costs + 16 * v, cost[v]);
}

/* Where the block's columns should be rounded, given the pull of all other columns. `pull` (n, 64) is sum over the
 * others of E[j] A[j][k]; it is overwritten. base = weight + (solution of U y = pull) / D. */
static void tile_aim(const bw_tile *t, float *pull, float *base) {
    bw_vf x[TILE_VECTORS], minus[TILE_VECTORS];
    for (ptrdiff_t k = t->n - 1; k >= 0; k--) {
        float *y = pull + k * BW_TILE_ROWS;
        bw_vf inverse = bw_set(1.0f / t->variance[k]);
        for (int v = 0; v < TILE_VECTORS; v++) minus[v] = bw_set(0);
        add_products(y + BW_TILE_ROWS, t->feedback + (k + 1) * t->stride + k, t->stride, t->n - 1 - k, minus);
        load_tile(y, x);
        for (int v = 0; v < TILE_VECTORS; v++) {
            x[v] = bw_sub(x[v], minus[v]);
            bw_store(y + 16 * v, x[v]);
            bw_vf weight = bw_load(t->weight + k * BW_TILE_ROWS + 16 * v);
            bw_store(base + k * BW_TILE_ROWS + 16 * v, bw_fma(x[v], inverse, weight));
        }
    }
}

/* Coordinate descent: each column in turn goes to its best level, all others kept. Returns whether any code
 * moved. `pull` as in tile_aim before the call. */
static int tile_descend(const bw_tile *t, const float *hessian, ptrdiff_t stride, const float *pull,
                        const bw_tile_grid *grid, float *errors, uint8_t *codes) {
    bw_vf bottom = bw_set(0), top = bw_set(t->top), x[TILE_VECTORS], moved = bw_set(0);
    for (ptrdiff_t k = 0; k < t->n; k++) {
        bw_vf inverse = bw_set(1.0f / hessian[k * stride + k]);
        load_tile(pull + k * BW_TILE_ROWS, x);
        add_products(errors, hessian + k * stride, 1, t->n, x);
        for (int v = 0; v < TILE_VECTORS; v++) {
            ptrdiff_t at = k * BW_TILE_ROWS + 16 * v;
            bw_vf zero = bw_load(grid->zeros + 16 * v), weight = bw_load(t->weight + at);
            bw_vf value = bw_add(bw_sub(weight, bw_load(errors + at)), bw_mul(x[v], inverse));
            bw_vf q = bw_add(bw_mul(value, bw_load(grid->inverses + 16 * v)), zero);
            q = bw_min(bw_max(bw_rint(q), bottom), top);
            bw_vf step = bw_sub(q, bw_load_u8(codes + at));
            moved = bw_add(moved, bw_mul(step, step));
            bw_store(errors + at, bw_sub(weight, bw_mul(bw_sub(q, zero), bw_load(grid->scales + 16 * v))));
            bw_store_u8(codes + at, q);
        }
    }
    return bw_sum(moved) > 0;
}

/* Least-squares steps for the codes as they are: scale += C(AE + pull) / (C A CT) with C = codes - zero, rounded to
 * fp16, kept in the rows where the cost falls. */
static void tile_refit(const bw_tile *t, const float *hessian, ptrdiff_t stride, const float *pull, bw_tile_grid *grid,
                       float *levels, float *errors, const uint8_t *codes) {
    bw_vf slope[TILE_VECTORS], curve[TILE_VECTORS], x[TILE_VECTORS], y[TILE_VECTORS];
    for (int v = 0; v < TILE_VECTORS; v++) slope[v] = curve[v] = bw_set(0);
    for (ptrdiff_t k = 0; k < t->n; k++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            ptrdiff_t at = k * BW_TILE_ROWS + 16 * v;
            bw_store(levels + at, bw_sub(bw_load_u8(codes + at), bw_load(grid->zeros + 16 * v)));
        }
    for (ptrdiff_t k = 0; k < t->n; k++) {
        load_tile(pull + k * BW_TILE_ROWS, x);
        add_products(errors, hessian + k * stride, 1, t->n, x);
        for (int v = 0; v < TILE_VECTORS; v++) y[v] = bw_set(0);
        add_products(levels, hessian + k * stride, 1, t->n, y);
        for (int v = 0; v < TILE_VECTORS; v++) {
            bw_vf level = bw_load(levels + k * BW_TILE_ROWS + 16 * v);
            slope[v] = bw_fma(level, x[v], slope[v]);
            curve[v] = bw_fma(level, y[v], curve[v]);
        }
    }
    for (int v = 0; v < TILE_VECTORS; v++) {
        bw_vf old = bw_load(grid->scales + 16 * v), none = bw_set(0);
        bw_vf new = round_scale(bw_add(old, bw_div(slope[v], curve[v]))), change = bw_sub(new, old);
        bw_vf cost = bw_mul(change, bw_sub(bw_mul(change, curve[v]), bw_add(slope[v], slope[v])));
        new = bw_select_less(cost, none, new, old);
        bw_store(grid->scales + 16 * v, new);
        bw_store(grid->inverses + 16 * v, bw_div(bw_set(1), new));
        for (ptrdiff_t at = 16 * v; at < t->n * BW_TILE_ROWS; at += BW_TILE_ROWS)
            bw_store(errors + at, bw_sub(bw_load(t->weight + at), bw_mul(bw_load(levels + at), new)));
    }
}
