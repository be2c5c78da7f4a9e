/* Round to nearest: a group's range -> (scale, zero), values -> codes, codes -> values.
 * No fused multiply-add, and sums of 16 fixed lanes, so every instruction set gives the same bytes. */

typedef struct {
    float low, high;  /* range, 0 included */
    float sum_abs;    /* sum of |w| */
    int finite;
} group_range;

static inline group_range find_range(const float *w, ptrdiff_t n) {
    bw_vf low = bw_set(0), high = bw_set(0), sum = bw_set(0), poison = bw_set(0), zero = bw_set(0);
    float tail[16] = {0};
    for (ptrdiff_t i = 0; i < n; i += 16) {
        const float *p = w + i;
        if (n - i < 16) {
            memcpy(tail, p, (size_t)(n - i) * 4);
            p = tail;
        }
        bw_vf v = bw_load(p);
        low = bw_min(low, v);
        high = bw_max(high, v);
        sum = bw_add(sum, bw_max(v, bw_sub(zero, v)));
        poison = bw_add(poison, bw_mul(v, zero)); /* NaN as soon as a value is not finite */
    }
    float bad = bw_sum(poison);
    return (group_range){bw_reduce_min(low), bw_reduce_max(high), bw_sum(sum), bad == bad};
}

/* Step between levels that covers the range without clipping. */
static inline float range_step(const group_range *r, ptrdiff_t n, const bw_scheme *scheme) {
    float top = (float)(scheme->levels - 1);
    if (!scheme->symmetric) return r->high / top - r->low / top; /* high - low may overflow */
    float zero = bw_symmetric_zero(scheme->levels);
    if (scheme->levels == 2) return 2.0f * (r->sum_abs / (float)n);
    float up = r->high / (top - zero), down = -r->low / zero;
    return up > down ? up : down;
}

static bw_status rtn_grid(const float *w, ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme, uint16_t *scales,
                          float *zeros) {
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t n = cols - first < group ? cols - first : group;
        group_range r = find_range(w + first, n);
        if (!r.finite) return BW_ERR_NONFINITE;
        float step = range_step(&r, n, scheme);
        if (!(step <= 65504.0f)) return BW_ERR_RANGE;
        uint16_t scale = bw_to_f16_up(step);
        if (!scale) scale = 1; /* an all-zero group: any step serves, the smallest fp16 number is > 0 */
        scales[g] = scale;
        if (scheme->symmetric) zeros[g] = bw_symmetric_zero(scheme->levels);
        else {
            float zero = rintf(-r.low * (1.0f / bw_from_f16(scale))), top = (float)(scheme->levels - 1);
            zeros[g] = zero < top ? zero : top;
        }
    }
    return BW_OK;
}

static void encode_row(const float *w, ptrdiff_t cols, ptrdiff_t group, int32_t levels, const uint16_t *scales,
                       const float *zeros, uint8_t *codes) {
    bw_vf bottom = bw_set(0), top = bw_set((float)(levels - 1));
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t n = cols - first < group ? cols - first : group, i = 0;
        bw_vf inverse = bw_set(1.0f / bw_from_f16(scales[g])), zero = bw_set(zeros[g]);
        const float *p = w + first;
        for (; i < n; i += 16) {
            float tail[16] = {0};
            uint8_t last[16];
            int whole = n - i >= 16;
            if (!whole) memcpy(tail, p + i, (size_t)(n - i) * 4);
            bw_vf q = bw_add(bw_mul(bw_load(whole ? p + i : tail), inverse), zero);
            q = bw_min(bw_max(bw_rint(q), bottom), top);
            bw_store_u8(whole ? codes + first + i : last, q);
            if (!whole) memcpy(codes + first + i, last, (size_t)(n - i));
        }
    }
}

static void decode_row(const uint8_t *codes, ptrdiff_t cols, ptrdiff_t group, const uint16_t *scales,
                       const float *zeros, float *out) {
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t n = cols - first < group ? cols - first : group, i = 0;
        float s = bw_from_f16(scales[g]), z = zeros[g];
        bw_vf scale = bw_set(s), zero = bw_set(z);
        for (; i + 16 <= n; i += 16)
            bw_store(out + first + i, bw_mul(bw_sub(bw_load_u8(codes + first + i), zero), scale));
        for (; i < n; i++) out[first + i] = ((float)codes[first + i] - z) * s;
    }
}
