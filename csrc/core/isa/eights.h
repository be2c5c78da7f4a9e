/* For instruction sets in which no unit of 64 codes is packed faster than its eights. */
static inline ptrdiff_t bw_pack_units(const uint8_t *codes, ptrdiff_t n, int bits, uint8_t *packed) {
    (void)codes, (void)n, (void)bits, (void)packed;
    return 0;
}
static inline ptrdiff_t bw_unpack_units(const uint8_t *packed, ptrdiff_t n, int bits, uint8_t *codes) {
    (void)codes, (void)n, (void)bits, (void)packed;
    return 0;
}
