/* The best (scale, zero) of a group: least sum of importance * (w - value)^2 over the whole group.
 *
 * Candidates lie in lanes: sixteen grids are tried in one pass over the group, each weight broadcast to all of them.
 * A pass scores a grid not by its own error but by the error that its codes reach once their scale is refitted by
 * least squares. With residuals r = t - q and centred codes c = q - zero, in steps of the scale s,
 *
 *     error(s) = s^2 sum m r^2,   best scale = s (1 + A / B),   its error = s^2 (sum m r^2 - A^2 / B),
 *     A = sum m r c,  B = sum m c^2,
 *
 * so a coarse net of scales is enough: the codes matter, not the exact step. Residuals keep the figures exact
 * where sum m w^2 - ... would cancel. Sums run in the order of the weights, and nothing is fused or approximated,
 * so every instruction set finds the same grid. */

typedef struct {
    const float *w, *m; /* values and importance; m is not read when not weighted */
    ptrdiff_t n;
    float top; /* levels - 1 */
    int weighted;
} clip_group;

/* One grid a lane, and how well it did. */
typedef struct {
    bw_vf error, scale, zero;
} clip_lanes;

static inline bw_vf clip_round_scale(bw_vf scale) {
    uint16_t half[16];
    bw_store_f16(half, bw_min(bw_max(scale, bw_set(0x1p-24f)), bw_set(65504.0f)));
    return bw_load_f16(half);
}

/* error = sum m r^2, slope = A, power = B of sixteen grids. */
static inline void clip_pass(const clip_group *g, int weighted, bw_vf scale, bw_vf zero, bw_vf *error, bw_vf *slope,
                             bw_vf *power) {
    bw_vf inverse = bw_div(bw_set(1.0f), scale), bottom = bw_set(0), top = bw_set(g->top);
    bw_vf e = bottom, a = bottom, b = bottom;
    for (ptrdiff_t i = 0; i < g->n; i++) {
        bw_vf t = bw_add(bw_mul(bw_set(g->w[i]), inverse), zero);
        bw_vf q = bw_min(bw_max(bw_rint(t), bottom), top);
        bw_vf r = bw_sub(t, q), c = bw_sub(q, zero), mr = r, mc = c;
        if (weighted) {
            bw_vf m = bw_set(g->m[i]);
            mr = bw_mul(m, r);
            mc = bw_mul(m, c);
        }
        e = bw_add(e, bw_mul(mr, r));
        a = bw_add(a, bw_mul(mr, c));
        b = bw_add(b, bw_mul(mc, c));
    }
    *error = e, *slope = a, *power = b;
}

/* Error of sixteen grids as they are, and the scale that refits each one's codes. */
static void clip_measure(const clip_group *g, bw_vf scale, bw_vf zero, bw_vf *error, bw_vf *refit, bw_vf *refit_error) {
    bw_vf e, a, b, one = bw_set(1.0f), square = bw_mul(scale, scale);
    if (g->weighted) clip_pass(g, 1, scale, zero, &e, &a, &b);
    else clip_pass(g, 0, scale, zero, &e, &a, &b);
    bw_vf gain = bw_div(a, bw_max(b, bw_set(1e-30f)));
    *error = bw_mul(square, e);
    *refit_error = bw_mul(square, bw_sub(e, bw_mul(gain, a)));
    *refit = bw_mul(scale, bw_add(one, bw_min(bw_max(gain, bw_set(-0.5f)), one)));
}

/* Keeps, lane by lane, the lesser of two. */
static inline void clip_keep(clip_lanes *best, bw_vf error, bw_vf scale, bw_vf zero) {
    best->scale = bw_select_less(error, best->error, scale, best->scale);
    best->zero = bw_select_less(error, best->error, zero, best->zero);
    best->error = bw_min(error, best->error);
}

/* Tries sixteen scales with the window's middle at `middle`, moved by -1, 0 and 1 codes; symmetric: with one zero. */
static void clip_try(const clip_group *g, const bw_scheme *scheme, bw_vf scale, float middle, clip_lanes *best) {
    bw_vf rounded = clip_round_scale(scale), error, refit, refit_error;
    bw_vf centre = bw_sub(bw_set(0.5f * g->top), bw_div(bw_set(middle), rounded));
    for (int move = scheme->symmetric ? 1 : -1; move <= 1; move++) {
        bw_vf zero = bw_rint(bw_add(centre, bw_set((float)move)));
        zero = bw_min(bw_max(zero, bw_set(0)), bw_set(g->top));
        if (scheme->symmetric) zero = bw_set(bw_symmetric_zero(scheme->levels));
        clip_measure(g, rounded, zero, &error, &refit, &refit_error);
        clip_keep(best, refit_error, refit, zero);
    }
}

static void clip_best_lane(const clip_lanes *lanes, float *scale, float *zero) {
    float errors[16], scales[16], zeros[16];
    int best = 0;
    bw_store(errors, lanes->error);
    bw_store(scales, lanes->scale);
    bw_store(zeros, lanes->zero);
    for (int i = 1; i < 16; i++)
        if (errors[i] < errors[best]) best = i;
    *scale = scales[best];
    *zero = zeros[best];
}

/* Step of the uniform quantizer that is best for a Gaussian of deviation 1 (J. Max, "Quantizing for minimum
 * distortion", 1960; the widest computed in the same way). The best step of a real group, however its tails and
 * importance look, was found between .45 of it and 4.5 times it, and at most half beyond the min-max step. */
static inline float clip_gauss_step(int32_t levels) {
    switch (levels) {
    case 2: return 1.596f;
    case 3: return 1.224f;
    case 4: return 0.9957f;
    case 8: return 0.5860f;
    case 16: return 0.3352f;
    case 32: return 0.1881f;
    case 64: return 0.1041f;
    default: return 0.0308f;
    }
}

typedef struct {
    float mass, mean, square; /* sum m; weighted means of w and w^2 */
} clip_moments;

static clip_moments clip_find_moments(const clip_group *g) {
    bw_vf mass = bw_set(0), sum = mass, square = mass;
    float w[16] = {0}, m[16] = {0};
    for (ptrdiff_t i = 0; i < g->n; i += 16) {
        ptrdiff_t left = g->n - i < 16 ? g->n - i : 16;
        if (left < 16) memset(w, 0, sizeof w), memset(m, 0, sizeof m);
        memcpy(w, g->w + i, (size_t)left * 4);
        if (g->weighted) memcpy(m, g->m + i, (size_t)left * 4);
        else
            for (ptrdiff_t j = 0; j < left; j++) m[j] = 1.0f;
        bw_vf vm = bw_load(m), vw = bw_load(w), mw = bw_mul(vm, vw);
        mass = bw_add(mass, vm);
        sum = bw_add(sum, mw);
        square = bw_add(square, bw_mul(mw, vw));
    }
    float total = bw_sum(mass);
    return (clip_moments){total, bw_sum(sum) / total, bw_sum(square) / total};
}

/* Thirty-two scales, evenly spaced by ratio; a narrower net around the best; then the best of each lane, refitted
 * twice and measured as they will be stored, beside round to nearest's own grid. */
static void clip_search(const clip_group *g, const bw_scheme *scheme, const clip_moments *moments, float step,
                        float middle, uint16_t *scale, float *zero) {
    float gauss = clip_gauss_step(scheme->levels), variance = moments->square - moments->mean * moments->mean;
    float spread = gauss * sqrtf(scheme->symmetric ? moments->square : variance > 0 ? variance : 0);
    float high = fminf(1.5f * step, 4.5f * gauss * sqrtf(moments->square));
    float low = fmaxf(fminf(0.45f * spread, 0.9f * step), high / 64);
    if (!(high > 0)) return; /* nothing that counts differs from zero */
    float ratio = sqrtf(sqrtf(sqrtf(sqrtf(sqrtf(fmaxf(high / low, 1.05f)))))), ladder[32];
    for (int i = 0; i < 32; i++) ladder[i] = high, high /= ratio;
    const bw_vf none = bw_set(INFINITY);
    clip_lanes best = {none, none, none}, final = {none, bw_set(bw_from_f16(*scale)), bw_set(*zero)};
    clip_try(g, scheme, bw_load(ladder), middle, &best);
    clip_try(g, scheme, bw_load(ladder + 16), middle, &best);
    if (!scheme->symmetric && fabsf(middle - moments->mean) > 0.5f * spread / gauss) { /* outliers pull the middle */
        clip_try(g, scheme, bw_load(ladder), moments->mean, &best);
        clip_try(g, scheme, bw_load(ladder + 16), moments->mean, &best);
    }
    float s, z, net[16];
    clip_best_lane(&best, &s, &z);
    for (int i = 0; i < 16; i++) net[i] = s * (1.0f + (ratio - 1.0f) * ((float)i - 7.5f) * 0.125f);
    clip_try(g, scheme, bw_load(net), (0.5f * g->top - z) * s, &best);
    for (int round = 0; round < 2; round++) {
        bw_vf rounded = clip_round_scale(best.scale), error, refit_error;
        clip_measure(g, rounded, best.zero, &error, &best.scale, &refit_error);
        clip_keep(&final, error, rounded, best.zero);
        if (round) break;
        float scales[16], zeros[16];
        bw_store(scales, best.scale), bw_store(zeros, best.zero);
        scales[0] = bw_from_f16(*scale), zeros[0] = *zero;
        best.scale = bw_load(scales), best.zero = bw_load(zeros);
    }
    clip_best_lane(&final, &s, zero);
    *scale = bw_to_f16(s);
}

static bw_status clip_grid(const float *w, ptrdiff_t cols, ptrdiff_t group, const bw_scheme *scheme,
                           const float *importance, uint16_t *scales, float *zeros) {
    bw_status status = rtn_grid(w, cols, group, scheme, scales, zeros);
    if (status) return status;
    for (ptrdiff_t i = 0, first = 0; first < cols; i++, first += group) {
        ptrdiff_t n = cols - first < group ? cols - first : group;
        clip_group g = {w + first, importance ? importance + first : NULL, n, (float)(scheme->levels - 1), 1};
        clip_moments moments = {0};
        if (importance) moments = clip_find_moments(&g);
        if (!(moments.mass > 0)) { /* no importance says no more than equal importance */
            g.weighted = 0;
            moments = clip_find_moments(&g);
        }
        group_range r = find_range(w + first, n);
        clip_search(&g, scheme, &moments, range_step(&r, n, scheme), 0.5f * (r.low + r.high), scales + i, zeros + i);
    }
    return BW_OK;
}
