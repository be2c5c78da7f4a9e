/* The squared error of many schemes on one row: ranges found once in blocks of 16 columns, grids of sixteen groups
 * at a time, and no codes kept. Ranges, grids and codes are those of rtn.h, to the bit. */

/* Range (0 included) of each 16 columns; BW_ERR_NONFINITE when a value is not finite. */
static bw_status find_ranges(const float *w, ptrdiff_t cols, float *low, float *high) {
    for (ptrdiff_t b = 0, first = 0; first < cols; b++, first += 16) {
        group_range r = find_range(w + first, cols - first < 16 ? cols - first : 16);
        if (!r.finite) return BW_ERR_NONFINITE;
        low[b] = r.low;
        high[b] = r.high;
    }
    return BW_OK;
}

/* Min-max grids of n groups from their ranges, as rtn_grid finds them; not for two symmetric levels, whose step is a
 * mean. Arrays hold whole vectors of 16. */
static bw_status range_grid(const float *low, const float *high, ptrdiff_t n, const bw_scheme *scheme, float *scales,
                            float *zeros) {
    bw_vf widest = bw_set(0);
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf l = bw_load(low + i), step = range_steps(l, bw_load(high + i), scheme);
        widest = bw_max(widest, step);
        step_grid(step, l, scheme, scales + i, zeros + i);
    }
    return bw_reduce_max(widest) <= 65504.0f ? BW_OK : BW_ERR_RANGE;
}

/* sum m (w - value)^2 of a row on a grid. w and m are padded to whole vectors of 16, m with zeros. */
static float grid_error(const float *w, const float *m, ptrdiff_t cols, ptrdiff_t group, int32_t levels,
                        const float *scales, const float *zeros) {
    bw_vf bottom = bw_set(0), top = bw_set((float)(levels - 1)), sum = bottom;
    for (ptrdiff_t g = 0, first = 0; first < cols; g++, first += group) {
        ptrdiff_t end = cols - first < group ? cols : first + group;
        bw_vf scale = bw_set(scales[g]), inverse = bw_set(1.0f / scales[g]), zero = bw_set(zeros[g]);
        for (ptrdiff_t i = first; i < end; i += 16) {
            bw_vf v = bw_load(w + i), q = bw_add(bw_mul(v, inverse), zero);
            q = bw_min(bw_max(bw_rint(q), bottom), top);
            bw_vf d = bw_sub(bw_mul(bw_sub(q, zero), scale), v);
            sum = bw_add(sum, bw_mul(bw_mul(d, d), bw_load(m + i)));
        }
    }
    return bw_sum(sum);
}
