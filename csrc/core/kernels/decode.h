/* What a decoder does between its products, on fp32 rows padded with zeros to whole vectors. Numbers are rounded to the
 * model's own dtype wherever its modules would hand them on, so that text comes out as the modules write it. */

static inline bw_vf round_lanes(bw_vf x, bw_dtype dtype) {
    uint16_t half[16];
    if (dtype == BW_F32) return x;
    if (dtype == BW_F16) {
        bw_store_f16(half, x);
        return bw_load_f16(half);
    }
    bw_store_bf16(half, x);
    return bw_load_bf16(half);
}

static inline float round_value(float x, bw_dtype dtype) {
    return dtype == BW_F32 ? x : dtype == BW_F16 ? bw_from_f16(bw_to_f16(x)) : bw_from_bf16(bw_to_bf16(x));
}

static void round_row(float *x, ptrdiff_t n, bw_dtype dtype) {
    for (ptrdiff_t i = 0; dtype != BW_F32 && i < n; i += 16) bw_store(x + i, round_lanes(bw_load(x + i), dtype));
}

/* x += scale * y, each step rounded. */
static void add_row(float *x, const float *y, ptrdiff_t n, float scale, bw_dtype dtype) {
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf part = bw_load(y + i);
        if (scale != 1) part = round_lanes(bw_mul(part, bw_set(scale)), dtype);
        bw_store(x + i, round_lanes(bw_add(bw_load(x + i), part), dtype));
    }
}

/* sum += weight * y, the product rounded. */
static void mix_row(float *sum, const float *y, ptrdiff_t n, float weight, bw_dtype dtype) {
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf part = round_lanes(bw_mul(bw_load(y + i), bw_set(weight)), dtype);
        bw_store(sum + i, bw_add(bw_load(sum + i), part));
    }
}

/* out = x / sqrt(mean of squares + eps), times a gain; n true columns. */
static void norm_row(const float *x, ptrdiff_t n, const float *gain, float eps, bw_gain kind, bw_dtype dtype,
                     float *out) {
    bw_vf sum = bw_set(0);
    for (ptrdiff_t i = 0; i < n; i += 16) sum = bw_fma(bw_load(x + i), bw_load(x + i), sum);
    bw_vf factor = bw_set(1.0f / sqrtf(bw_sum(sum) / (float)n + eps));
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf y = bw_mul(bw_load(x + i), factor);
        if (kind == BW_GAIN_ROUNDED) y = round_lanes(y, dtype);
        if (kind == BW_GAIN_PLUS_ONE) y = bw_mul(y, bw_add(bw_set(1), bw_load(gain + i)));
        else if (kind != BW_GAIN_NONE) y = bw_mul(y, bw_load(gain + i));
        bw_store(out + i, round_lanes(y, dtype));
    }
}

/* Rotates pairs (i, i + n/2) of the first n numbers of a head. `steps`: each product is rounded by itself. */
static void rotate_row(float *x, ptrdiff_t n, const float *cosine, const float *sine, int steps, bw_dtype dtype) {
    ptrdiff_t half = n / 2, i = 0;
    bw_dtype inner = steps ? dtype : BW_F32;
    for (; i + 16 <= half; i += 16) {
        bw_vf a = bw_load(x + i), b = bw_load(x + half + i);
        bw_vf ac = round_lanes(bw_mul(a, bw_load(cosine + i)), inner),
              bs = round_lanes(bw_mul(b, bw_load(sine + i)), inner),
              bc = round_lanes(bw_mul(b, bw_load(cosine + half + i)), inner),
              as = round_lanes(bw_mul(a, bw_load(sine + half + i)), inner);
        bw_store(x + i, round_lanes(bw_sub(ac, bs), dtype));
        bw_store(x + half + i, round_lanes(bw_add(bc, as), dtype));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        float ac = round_value(a * cosine[i], inner), bs = round_value(b * sine[i], inner),
              bc = round_value(b * cosine[half + i], inner), as = round_value(a * sine[half + i], inner);
        x[i] = round_value(ac - bs, dtype);
        x[half + i] = round_value(bc + as, dtype);
    }
}

/* exp(x) for any finite x; beyond fp32's range the largest power that exp_lanes reaches. */
static inline bw_vf exp_within(bw_vf x) {
    return exp_lanes(bw_min(x, bw_set(87.0f)));
}

/* 1 / (1 + exp(-x)), from the smaller exponential. */
static inline bw_vf logistic_lanes(bw_vf x) {
    bw_vf one = bw_set(1);
    return bw_div(one, bw_add(one, exp_within(bw_sub(bw_set(0), x))));
}

static inline bw_vf tanh_lanes(bw_vf x) {
    bw_vf twice = logistic_lanes(bw_add(x, x)), small = bw_mul(x, x);
    /* Near 0 the difference below loses its digits: there x - x^3/3 + 2 x^5/15 is as good as fp32. */
    bw_vf series =
        bw_mul(x, bw_add(bw_set(1), bw_mul(small, bw_add(bw_set(-1.0f / 3), bw_mul(small, bw_set(2.0f / 15))))));
    return bw_select_less(small, bw_set(0.0025f), series, bw_sub(bw_add(twice, twice), bw_set(1)));
}

static inline bw_vf activate_lanes(bw_vf x, bw_activation kind) {
    bw_vf zero = bw_set(0), half = bw_set(0.5f);
    if (kind == BW_SILU) return bw_mul(x, logistic_lanes(x));
    if (kind == BW_RELU || kind == BW_RELU_SQUARED) {
        bw_vf y = bw_max(zero, x);
        return kind == BW_RELU ? y : bw_mul(y, y);
    }
    if (kind == BW_GELU_TANH) {
        bw_vf inner = bw_mul(bw_set(0.7978845608f), bw_add(x, bw_mul(bw_set(0.044715f), bw_mul(bw_mul(x, x), x))));
        return bw_mul(bw_mul(half, x), bw_add(bw_set(1), tanh_lanes(inner)));
    }
    float v[16];
    bw_store(v, bw_mul(x, bw_set(0.70710678f)));
    for (int i = 0; i < 16; i++) v[i] = erff(v[i]);
    return bw_mul(bw_mul(half, x), bw_add(bw_set(1), bw_load(v)));
}

/* x = f(x), times `up` unless that is NULL. */
static void activate_row(float *x, const float *up, ptrdiff_t n, bw_activation kind, bw_dtype dtype) {
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf y = round_lanes(activate_lanes(bw_load(x + i), kind), dtype);
        if (up) y = round_lanes(bw_mul(y, bw_load(up + i)), dtype);
        bw_store(x + i, y);
    }
}

/* x = (up + 1) * (x * logistic(alpha * x)), x at most `limit` and up within it on both sides; each step rounded. */
static void clamped_row(float *x, const float *up, ptrdiff_t n, float alpha, float limit, bw_dtype dtype) {
    bw_vf top = bw_set(limit), bottom = bw_set(-limit);
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf gate = bw_min(bw_load(x + i), top), u = bw_max(bw_min(bw_load(up + i), top), bottom);
        bw_vf share = round_lanes(logistic_lanes(round_lanes(bw_mul(gate, bw_set(alpha)), dtype)), dtype);
        bw_vf y = round_lanes(bw_mul(gate, share), dtype);
        bw_store(x + i, round_lanes(bw_mul(round_lanes(bw_add(u, bw_set(1)), dtype), y), dtype));
    }
}

static inline bw_vf load_lanes(const char *p, bw_dtype dtype) {
    return dtype == BW_F32   ? bw_load((const float *)(const void *)p)
           : dtype == BW_F16 ? bw_load_f16(p)
                             : bw_load_bf16(p);
}

/* n numbers to fp32, zeros up to a whole vector. */
static inline void load_padded(const char *p, ptrdiff_t n, bw_dtype dtype, float *out) {
    ptrdiff_t size = dtype == BW_F32 ? 4 : 2, i = 0;
    for (; i + 16 <= n; i += 16) bw_store(out + i, load_lanes(p + i * size, dtype));
    if (i == n) return;
    char rest[64] = {0};
    memcpy(rest, p + i * size, (size_t)((n - i) * size));
    bw_store(out + i, load_lanes(rest, dtype));
}

/* scores (n_heads rows, job->stride apart) = scale * queries times keys 0 .. n-1. */
static void attend_scores(const bw_attend *job, const float *queries, const char *keys, ptrdiff_t n, float *scores) {
    enum { AT_ONCE = 4 };
    ptrdiff_t dim = job->dim, padded = (dim + 15) / 16 * 16, size = job->dtype == BW_F32 ? 4 : 2;
    float rows[AT_ONCE * BW_MOST_HEAD];
    for (ptrdiff_t j = 0; j < n; j += AT_ONCE) {
        int taken = n - j < AT_ONCE ? (int)(n - j) : AT_ONCE;
        for (int r = 0; r < AT_ONCE; r++)
            load_padded(keys + (j + (r < taken ? r : 0)) * dim * size, dim, job->dtype, rows + r * BW_MOST_HEAD);
        for (int h = 0; h < job->n_heads; h++) {
            const float *q = queries + h * job->query_stride;
            bw_vf sums[AT_ONCE];
            float four[AT_ONCE];
            for (int r = 0; r < AT_ONCE; r++) sums[r] = bw_set(0);
            for (ptrdiff_t i = 0; i < padded; i += 16) {
                bw_vf x = bw_load(q + i);
#pragma GCC unroll 4
                for (int r = 0; r < AT_ONCE; r++) sums[r] = bw_fma(x, bw_load(rows + r * BW_MOST_HEAD + i), sums[r]);
            }
            bw_sum_four(sums, four);
            for (int r = 0; r < taken; r++) scores[h * job->stride + j + r] = four[r] * job->scale;
        }
    }
}

/* In place: exp(score - largest), scores capped before; returns their sum. Reads whole vectors, so that 15 numbers
 * after the last are overwritten. */
static float attend_weights(float *scores, ptrdiff_t n, float cap) {
    for (ptrdiff_t i = n; i < (n + 15) / 16 * 16; i++) scores[i] = -INFINITY;
    bw_vf top = bw_set(-INFINITY), sum = bw_set(0);
    for (ptrdiff_t i = 0; i < n; i += 16) {
        if (cap > 0) bw_store(scores + i, bw_mul(tanh_lanes(bw_div(bw_load(scores + i), bw_set(cap))), bw_set(cap)));
        if (cap > 0)
            for (ptrdiff_t k = n; k < i + 16; k++) scores[k] = -INFINITY;
        top = bw_max(bw_load(scores + i), top);
    }
    bw_vf largest = bw_set(bw_reduce_max(top));
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf weight = exp_lanes(bw_sub(bw_load(scores + i), largest));
        bw_store(scores + i, weight);
        sum = bw_add(sum, weight);
    }
    return bw_sum(sum);
}

/* One vector of columns of the weighted sum of n rows of values. */
static inline bw_vf mix_vector(const float *weights, const char *values, ptrdiff_t n, ptrdiff_t row_bytes,
                               bw_dtype dtype) {
    bw_vf sum = bw_set(0);
    for (ptrdiff_t j = 0; j < n; j++) sum = bw_fma(bw_set(weights[j]), load_lanes(values + j * row_bytes, dtype), sum);
    return sum;
}

/* out (n_heads rows, job->out_stride apart) = weights times values 0 .. n-1, divided by `totals`. */
static void attend_mix(const bw_attend *job, const float *weights, const float *totals, const char *values, ptrdiff_t n,
                       float *out) {
    ptrdiff_t dim = job->dim, size = job->dtype == BW_F32 ? 4 : 2, bytes = dim * size;
    for (int h = 0; h < job->n_heads; h++) {
        const float *w = weights + h * job->stride;
        float *to = out + h * job->out_stride;
        bw_vf inverse = bw_set(1.0f / totals[h]);
        ptrdiff_t i = 0;
        for (; i + 64 <= dim; i += 64) { /* four sums, so that one does not wait for itself */
            bw_vf sums[4];
            for (int k = 0; k < 4; k++) sums[k] = bw_set(0);
            const char *p = values + i * size;
            for (ptrdiff_t j = 0; j < n; j++, p += bytes) {
                bw_vf weight = bw_set(w[j]);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++)
                    sums[k] = bw_fma(weight, load_lanes(p + 16 * k * size, job->dtype), sums[k]);
            }
            for (int k = 0; k < 4; k++) bw_store(to + i + 16 * k, bw_mul(sums[k], inverse));
        }
        for (; i + 16 <= dim; i += 16)
            bw_store(to + i, bw_mul(mix_vector(w, values + i * size, n, bytes, job->dtype), inverse));
        if (i == dim) continue;
        float row[16];
        bw_vf sum = bw_set(0);
        for (ptrdiff_t j = 0; j < n; j++) {
            load_padded(values + j * bytes + i * size, dim - i, job->dtype, row);
            sum = bw_fma(bw_set(w[j]), bw_load(row), sum);
        }
        bw_store(row, bw_mul(sum, inverse));
        memcpy(to + i, row, (size_t)(dim - i) * 4);
    }
}

/* out[r] = x times rows first .. first+n-1 of a matrix of plain numbers, x padded with zeros to whole vectors. */
static void dense_rows(const bw_matrix *weight, ptrdiff_t first, ptrdiff_t n, const float *x, float *out) {
    ptrdiff_t cols = weight->cols, size = weight->dtype == BW_F32 ? 4 : 2, whole = cols / 64 * 64;
    for (ptrdiff_t r = 0; r < n; r++) {
        const char *p = (const char *)weight->data + (first + r) * weight->row_stride * size;
        bw_vf sums[4];
        ptrdiff_t i = 0;
        for (int k = 0; k < 4; k++) sums[k] = bw_set(0);
        for (; i < whole; i += 64)
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
                sums[k] = bw_fma(bw_load(x + i + 16 * k), load_lanes(p + (i + 16 * k) * size, weight->dtype), sums[k]);
        for (; i < cols; i += 16) {
            float rest[16];
            load_padded(p + i * size, cols - i < 16 ? cols - i : 16, weight->dtype, rest);
            sums[0] = bw_fma(bw_load(x + i), bw_load(rest), sums[0]);
        }
        out[r] = bw_sum(bw_add(bw_add(sums[0], sums[1]), bw_add(sums[2], sums[3])));
    }
}
