/* Blocks of logits: their largest, sums of exponentials, and the pieces of a KL divergence. Blocks hold whole vectors
 * of 16, padded with -infinity. Sums run in fp32 lanes within a block; the verbs add blocks in fp64. */

#define EXP_LEAST (-87.3f) /* below it exp(x) is no normal number, and counts as 0 */

/* exp(x) for x <= 0 (rounding may carry it a little above), relative error 1e-7; NaN stays NaN.
 * x = n ln 2 + r with ln 2 in two parts, then a polynomial fitted to (exp(r) - 1 - r) / r^2 at Chebyshev nodes. */
static inline bw_vf exp_lanes(bw_vf x) {
    bw_vf n = bw_rint(bw_mul(x, bw_set(1.44269504f))), one = bw_set(1.0f);
    bw_vf r = bw_sub(bw_sub(x, bw_mul(n, bw_set(0.693359375f))), bw_mul(n, bw_set(-2.12194440e-4f)));
    bw_vf p = bw_set(0.001393368816934526f);
    p = bw_add(bw_mul(p, r), bw_set(0.008363205008208752f));
    p = bw_add(bw_mul(p, r), bw_set(0.041666463017463684f));
    p = bw_add(bw_mul(p, r), bw_set(0.16666576266288757f));
    p = bw_add(bw_mul(p, r), bw_set(0.5f));
    p = bw_add(bw_add(bw_mul(p, bw_mul(r, r)), r), one);
    return bw_select_less(x, bw_set(EXP_LEAST), bw_set(0), bw_mul(p, bw_pow2(n)));
}

/* NaN is passed over. */
static float block_max(const float *x, ptrdiff_t n) {
    bw_vf largest = bw_set(-INFINITY);
    for (ptrdiff_t i = 0; i < n; i += 16) largest = bw_max(bw_load(x + i), largest);
    return bw_reduce_max(largest);
}

/* sum exp(x - max) */
static float block_exp(const float *x, ptrdiff_t n, float max) {
    bw_vf sum = bw_set(0), top = bw_set(max);
    for (ptrdiff_t i = 0; i < n; i += 16) sum = bw_add(sum, exp_lanes(bw_sub(bw_load(x + i), top)));
    return bw_sum(sum);
}

/* With a' = a - a_max and b' = b - b_max: adds sum exp(a'), sum exp(b') and sum exp(a') (a' - b') to sums[0..2]. */
static void block_kl(const float *a, const float *b, ptrdiff_t n, float a_max, float b_max, double *sums) {
    bw_vf zero = bw_set(0), sum_a = zero, sum_b = zero, cross = zero, top_a = bw_set(a_max), top_b = bw_set(b_max);
    for (ptrdiff_t i = 0; i < n; i += 16) {
        bw_vf da = bw_sub(bw_load(a + i), top_a), db = bw_sub(bw_load(b + i), top_b);
        bw_vf p = exp_lanes(da), term = bw_mul(p, bw_sub(da, db));
        sum_a = bw_add(sum_a, p);
        sum_b = bw_add(sum_b, exp_lanes(db));
        /* What has no probability costs nothing, even where b is -infinity. */
        cross = bw_add(cross, bw_select_less(da, bw_set(EXP_LEAST), zero, term));
    }
    sums[0] += bw_sum(sum_a);
    sums[1] += bw_sum(sum_b);
    sums[2] += bw_sum(cross);
}
