/* Trainable rounding of one row: quantize and dequantize in one pass, and the straight-through gradient of that.
 *
 * scale = (high - low) / top, as fp16 holds it; zero = rint(-low / scale); q = clamp(rint(w / scale + zero + offset));
 * value = (q - zero) * scale.  Symmetric: low is not read, scale = high / (top - zero), zero is the scheme's. */

typedef struct {
    float scale, zero, inverse;
    float top;      /* levels - 1 */
    int zero_moves; /* with low and scale: asymmetric, and not held at an end */
} round_grid;

static inline round_grid grid_of_range(const bw_scheme *scheme, const float *low, const float *high, ptrdiff_t g) {
    float top = (float)(scheme->levels - 1), zero = bw_symmetric_zero(scheme->levels);
    float step = scheme->symmetric ? high[g] / (top - zero) : (high[g] - low[g]) / top;
    step = step > 0x1p-24f ? step : 0x1p-24f; /* so written, NaN becomes the smallest */
    float scale = bw_from_f16(bw_to_f16(step < 65504.0f ? step : 65504.0f));
    int zero_moves = 0;
    if (!scheme->symmetric) {
        float free = rintf(-low[g] / scale);
        zero = free > 0 ? (free < top ? free : top) : 0;
        zero_moves = zero == free;
    }
    return (round_grid){scale, zero, 1.0f / scale, top, zero_moves};
}

static void train_forward(const float *w, const float *offset, const float *low, const float *high, ptrdiff_t cols,
                          ptrdiff_t group, const bw_scheme *scheme, float *out) {
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t end = cols - first < group ? cols : first + group, i = first;
        round_grid r = grid_of_range(scheme, low, high, g);
        bw_vf scale = bw_set(r.scale), zero = bw_set(r.zero), inverse = bw_set(r.inverse), top = bw_set(r.top);
        for (; i + 16 <= end; i += 16) {
            bw_vf t = bw_add(bw_add(bw_mul(bw_load(w + i), inverse), zero), bw_load(offset + i));
            bw_vf q = bw_min(bw_max(bw_rint(t), bw_set(0)), top);
            bw_store(out + i, bw_mul(bw_sub(q, zero), scale));
        }
        for (; i < end; i++) {
            float q = rintf(w[i] * r.inverse + r.zero + offset[i]);
            q = q > 0 ? (q < r.top ? q : r.top) : 0;
            out[i] = (q - r.zero) * r.scale;
        }
    }
}

/* Sums over one group. inside: grad * (q - zero - w / scale) of codes that were not clamped; outside: grad * (q - zero)
 * of those that were; clamped: grad of those that were. */
typedef struct {
    float inside, outside, clamped;
} group_slopes;

static inline group_slopes slopes_of_group(const float *w, const float *offset, const float *grad, ptrdiff_t n,
                                           const round_grid *r, float *into_offset) {
    bw_vf none = bw_set(0), inside = none, outside = none, clamped = none;
    bw_vf scale = bw_set(r->scale), zero = bw_set(r->zero), inverse = bw_set(r->inverse), top = bw_set(r->top);
    float part[3][16], last[16];
    for (ptrdiff_t i = 0; i < n; i += 16) {
        ptrdiff_t here = n - i < 16 ? n - i : 16;
        const float *p[3] = {w + i, offset + i, grad + i};
        if (here < 16)
            for (int k = 0; k < 3; k++) {
                memset(part[k], 0, sizeof part[k]);
                memcpy(part[k], p[k], (size_t)here * 4);
                p[k] = part[k];
            }
        bw_vf x = bw_mul(bw_load(p[0]), inverse), slope = bw_load(p[2]);
        bw_vf t = bw_rint(bw_add(bw_add(x, zero), bw_load(p[1])));
        bw_vf level = bw_sub(bw_min(bw_max(t, none), top), zero);
        bw_vf free = bw_select_less(t, none, none, bw_select_less(top, t, none, slope)), stuck = bw_sub(slope, free);
        inside = bw_add(inside, bw_mul(free, bw_sub(level, x)));
        outside = bw_add(outside, bw_mul(stuck, level));
        clamped = bw_add(clamped, stuck);
        bw_store(here < 16 ? last : into_offset + i, bw_mul(free, scale));
        if (here < 16) memcpy(into_offset + i, last, (size_t)here * 4);
    }
    return (group_slopes){bw_sum(inside), bw_sum(outside), bw_sum(clamped)};
}

static void train_backward(const float *w, const float *offset, const float *low, const float *high, const float *grad,
                           ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme, float *into_offset,
                           float *into_low, float *into_high) {
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t n = cols - first < group ? cols - first : group;
        round_grid r = grid_of_range(scheme, low, high, g);
        group_slopes s = slopes_of_group(w + first, offset + first, grad + first, n, &r, into_offset + first);
        float into_scale = s.inside + s.outside;
        if (scheme->symmetric) {
            into_high[g] = into_scale / (r.top - r.zero);
            continue;
        }
        /* The zero moves a clamped value by -scale, the others not at all; zero = -low / scale. */
        if (r.zero_moves) into_scale -= s.clamped * low[g] / r.scale;
        into_high[g] = into_scale / r.top;
        into_low[g] = (r.zero_moves ? s.clamped : 0) - into_scale / r.top;
    }
}
