/* Round to nearest: a group's range -> (scale, zero), values -> codes, codes -> values.
 * No fused multiply-add, and sums of 16 fixed lanes, so every instruction set gives the same bytes. */

typedef struct {
    float low, high; /* range, 0 included */
    float sum_abs;   /* sum of |w| */
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

/* range_step of sixteen groups. */
static inline bw_vf range_steps(bw_vf low, bw_vf high, const bw_scheme *scheme) {
    float top = (float)(scheme->levels - 1), zero = bw_symmetric_zero(scheme->levels);
    if (!scheme->symmetric) return bw_sub(bw_div(high, bw_set(top)), bw_div(low, bw_set(top)));
    return bw_max(bw_div(high, bw_set(top - zero)), bw_div(low, bw_set(-zero)));
}

/* Sixteen steps to fp16, upwards, as bw_to_f16_up does; at least the smallest fp16 number. */
static inline bw_vf round_up(bw_vf step) {
    uint16_t half[16];
    bw_vf least = bw_set(0x1p-24f);
    bw_store_f16(half, bw_max(step, least));
    bw_vf near = bw_load_f16(half);
    /* Three quarters of a unit further rounds to the next number. */
    bw_store_f16(half, bw_add(near, bw_max(bw_mul(near, bw_set(0x1.8p-11f)), bw_mul(least, bw_set(0.75f)))));
    return bw_select_less(near, step, bw_load_f16(half), near);
}

/* Scales and zeros of sixteen groups from their steps and lower ends. */
static inline void step_grid(bw_vf step, bw_vf low, const bw_scheme *scheme, float *scales, float *zeros) {
    bw_vf scale = round_up(step), zero = bw_set(bw_symmetric_zero(scheme->levels));
    if (!scheme->symmetric) {
        zero = bw_rint(bw_mul(bw_sub(bw_set(0), low), bw_div(bw_set(1.0f), scale)));
        zero = bw_min(zero, bw_set((float)(scheme->levels - 1)));
    }
    bw_store(scales, scale);
    bw_store(zeros, zero);
}

/* Ends of one group in lanes, 0 included; `poison` becomes NaN when a value is not finite. */
static inline void find_ends(const float *w, ptrdiff_t n, bw_vf *low, bw_vf *high, bw_vf *poison) {
    bw_vf zero = bw_set(0), least = zero, most = zero, bad = *poison;
    ptrdiff_t i = 0;
    for (; i + 16 <= n; i += 16) {
        bw_vf v = bw_load(w + i);
        least = bw_min(least, v);
        most = bw_max(most, v);
        bad = bw_fma(v, zero, bad); /* exact: 0, or NaN */
    }
    if (i < n) {
        float tail[16] = {0};
        memcpy(tail, w + i, (size_t)(n - i) * 4);
        bw_vf v = bw_load(tail);
        least = bw_min(least, v);
        most = bw_max(most, v);
        bad = bw_fma(v, zero, bad);
    }
    *low = least;
    *high = most;
    *poison = bad;
}

/* Up to sixteen groups at a time: their ranges one by one, their grids in lanes. */
static bw_status rtn_grid(const float *w, ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme, uint16_t *scales,
                          float *zeros) {
    int mean = scheme->symmetric && scheme->levels == 2;
    for (ptrdiff_t first = 0; first < cols; scales += 16, zeros += 16) {
        float low[16], high[16], found_zeros[16], found[16];
        uint16_t halves[16];
        bw_vf poison = bw_set(0), least[16], most[16];
        int k = 0;
        for (; k < 16 && first < cols; k++, first += group) {
            ptrdiff_t n = cols - first < group ? cols - first : group;
            find_ends(w + first, n, &least[k], &most[k], &poison);
            if (!mean) continue;
            group_range r = find_range(w + first, n);
            most[k] = bw_set(range_step(&r, n, scheme));
        }
        for (int j = k; j < (k + 3) / 4 * 4; j++) least[j] = most[j] = bw_set(0);
        for (int j = 0; j < k; j += 4) bw_min_four(least + j, low + j), bw_max_four(most + j, high + j);
        for (int j = (k + 3) / 4 * 4; j < 16; j++) low[j] = high[j] = 0;
        float bad = bw_sum(poison);
        if (bad != bad) return BW_ERR_NONFINITE;
        bw_vf l = bw_load(low), h = bw_load(high), step = mean ? h : range_steps(l, h, scheme);
        if (!(bw_reduce_max(step) <= 65504.0f)) return BW_ERR_RANGE;
        step_grid(step, l, scheme, found, found_zeros);
        bw_store_f16(halves, bw_load(found));
        memcpy(scales, halves, (size_t)k * 2);
        memcpy(zeros, found_zeros, (size_t)k * 4);
    }
    return BW_OK;
}

/* Steps of up to sixteen groups as fp32, and their inverses. */
static inline void load_scales(const uint16_t *scales, ptrdiff_t n, float *steps, float *inverses) {
    uint16_t halves[16] = {0};
    memcpy(halves, scales, (size_t)(n < 16 ? n : 16) * 2);
    bw_vf step = bw_load_f16(halves);
    bw_store(steps, step);
    bw_store(inverses, bw_div(bw_set(1.0f), step));
}

static inline bw_vf encode_lanes(const float *p, bw_vf inverse, bw_vf zero, bw_vf top) {
    bw_vf q = bw_add(bw_mul(bw_load(p), inverse), zero);
    return bw_min(bw_max(q, bw_set(0)),
                  top); /* bw_store_u8 rounds: both ends are whole, so clamping first is the same */
}

static void encode_row(const float *w, ptrdiff_t cols, ptrdiff_t group, int32_t levels, const uint16_t *scales,
                       const float *zeros, uint8_t *codes) {
    bw_vf top = bw_set((float)(levels - 1));
    ptrdiff_t n_groups = (cols + group - 1) / group;
    float steps[16], inverses[16];
    for (ptrdiff_t g = 0, i = 0; g < n_groups; g++) {
        if (g % 16 == 0) load_scales(scales + g, n_groups - g, steps, inverses);
        ptrdiff_t end = cols - i < group ? cols : i + group;
        bw_vf inverse = bw_set(inverses[g % 16]), zero = bw_set(zeros[g]);
        for (; i + 16 <= end; i += 16) bw_store_u8(codes + i, encode_lanes(w + i, inverse, zero, top));
        if (i < end) {
            float tail[16] = {0};
            uint8_t last[16];
            memcpy(tail, w + i, (size_t)(end - i) * 4);
            bw_store_u8(last, encode_lanes(tail, inverse, zero, top));
            memcpy(codes + i, last, (size_t)(end - i));
            i = end;
        }
    }
}

/* n <= 16 values of one group; whole vectors are stored as they are. */
static inline void store_values(bw_vf values, ptrdiff_t n, bw_dtype dtype, char *out) {
    char last[64];
    char *to = n < 16 ? last : out;
    if (dtype == BW_F32) bw_store((float *)to, values);
    else if (dtype == BW_F16) bw_store_f16(to, values);
    else bw_store_bf16(to, values);
    if (n < 16) memcpy(out, last, (size_t)n * (dtype == BW_F32 ? 4 : 2));
}

/* Inlined for each dtype, so that the loop asks nothing. May read 15 codes past the end. */
static inline __attribute__((always_inline)) void decode_as(const uint8_t *codes, ptrdiff_t cols, ptrdiff_t group,
                                                            const uint16_t *scales, const float *zeros,
                                                            const bw_dtype dtype, char *out) {
    const ptrdiff_t size = dtype == BW_F32 ? 4 : 2;
    for (ptrdiff_t g = 0, i = 0; i < cols; g++) {
        ptrdiff_t end = cols - i < group ? cols : i + group;
        bw_vf scale = bw_set(bw_from_f16(scales[g])), zero = bw_set(zeros[g]);
        for (; i + 16 <= end; i += 16)
            store_values(bw_mul(bw_sub(bw_load_u8(codes + i), zero), scale), 16, dtype, out + i * size);
        if (i < end) store_values(bw_mul(bw_sub(bw_load_u8(codes + i), zero), scale), end - i, dtype, out + i * size);
        i = end;
    }
}

static void decode_row(const uint8_t *codes, ptrdiff_t cols, ptrdiff_t group, const uint16_t *scales,
                       const float *zeros, bw_dtype dtype, void *out) {
    if (dtype == BW_F32) decode_as(codes, cols, group, scales, zeros, BW_F32, out);
    else if (dtype == BW_F16) decode_as(codes, cols, group, scales, zeros, BW_F16, out);
    else decode_as(codes, cols, group, scales, zeros, BW_BF16, out);
}
