/* Gathering and spreading of bits without BMI2, for sets that lack the instructions.
 * The masks of the codecs repeat one field of `bits` bits in each of eight bytes: bw_pext moves the bits of x under
 * the mask to the low end, bw_pdep spreads them back. */
static inline uint64_t bw_pext(uint64_t x, uint64_t mask) {
    int bits = __builtin_popcountll(mask) / 8;
    uint64_t r = 0;
    for (int i = 7; i >= 0; i--) r = r << bits | (x >> 8 * i & mask & 255u);
    return r;
}
static inline uint64_t bw_pdep(uint64_t x, uint64_t mask) {
    int bits = __builtin_popcountll(mask) / 8;
    uint64_t r = 0;
    for (int i = 0; i < 8; i++) r |= (x >> bits * i & mask & 255u) << 8 * i;
    return r;
}
