/* Sums, smallest and largest of sixteen lanes, in one order on every x86 set. The set defines HALVES and FOLD_FOUR. */

#define FOLD(op)                                                                                 \
    __m256 eight = HALVES(op, x);                                                                \
    __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                 \
    return _mm_cvtss_f32(_mm_##op##_ss(two, _mm_movehdup_ps(two)))
static inline float bw_sum(bw_vf x) {
    FOLD(add);
}
static inline float bw_reduce_min(bw_vf x) {
    FOLD(min);
}
static inline float bw_reduce_max(bw_vf x) {
    FOLD(max);
}
static inline void bw_sum_four(const bw_vf *x, float *out) {
    FOLD_FOUR(add);
}
static inline void bw_min_four(const bw_vf *x, float *out) {
    FOLD_FOUR(min);
}
static inline void bw_max_four(const bw_vf *x, float *out) {
    FOLD_FOUR(max);
}

#define bw_pext(x, mask) _pext_u64(x, mask)
#define bw_pdep(x, mask) _pdep_u64(x, mask)
