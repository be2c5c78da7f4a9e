/* Dense codes of 1 .. 8 bits, least significant bit first: code i takes bits i*b .. i*b+b-1 of the stream.
 *
 *   4 bits:  byte 0 = c1 c1 c1 c1 c0 c0 c0 c0,  byte 1 = c3 .. c2 ..
 *   3 bits:  byte 0 = c2 c2 c1 c1 c1 c0 c0 c0,  byte 1 = c5 c4 c4 c4 c3 c3 c3 c2, ...
 *
 * Eight codes fill exactly `bits` bytes, so the loop moves eight codes at a time: bw_pext and bw_pdep
 * gather and spread the low bits of eight bytes. Instruction sets that move units of 64 codes go first and say how many
 * codes they did. */

static inline uint64_t dense_mask(int bits) {
    return 0x0101010101010101u * (uint64_t)((1 << bits) - 1);
}

static void dense_pack(const uint8_t *codes, ptrdiff_t n, int bits, uint8_t *packed) {
    uint64_t mask = dense_mask(bits);
    ptrdiff_t n_bytes = (n * bits + 7) / 8, i = bw_pack_units(codes, n, bits, packed), done = i / 8 * bits;
    uint64_t eight;
    for (; i + 8 <= n && done + 8 <= n_bytes; i += 8, done += bits) { /* whole words, overwritten by the next */
        memcpy(&eight, codes + i, 8);
        uint64_t stream = bw_pext(eight, mask);
        memcpy(packed + done, &stream, 8);
    }
    for (; i + 8 <= n; i += 8, done += bits) {
        memcpy(&eight, codes + i, 8);
        uint64_t stream = bw_pext(eight, mask);
        memcpy(packed + done, &stream, (size_t)bits);
    }
    if (i < n) {
        uint8_t last[8] = {0};
        memcpy(last, codes + i, (size_t)(n - i));
        memcpy(&eight, last, 8);
        uint64_t stream = bw_pext(eight, mask);
        memcpy(packed + done, &stream, (size_t)(n_bytes - done));
    }
}

static int dense_unpack(const uint8_t *packed, ptrdiff_t n, int bits, uint8_t *codes) {
    uint64_t mask = dense_mask(bits);
    ptrdiff_t n_bytes = (n * bits + 7) / 8, i = bw_unpack_units(packed, n, bits, codes), done = i / 8 * bits;
    for (; i + 8 <= n && done + 8 <= n_bytes; i += 8, done += bits) {
        uint64_t stream;
        memcpy(&stream, packed + done, 8);
        uint64_t eight = bw_pdep(stream, mask);
        memcpy(codes + i, &eight, 8);
    }
    for (; i + 8 <= n; i += 8, done += bits) {
        uint64_t stream = 0;
        memcpy(&stream, packed + done, (size_t)bits);
        uint64_t eight = bw_pdep(stream, mask);
        memcpy(codes + i, &eight, 8);
    }
    if (i < n) {
        uint64_t stream = 0;
        memcpy(&stream, packed + done, (size_t)(n_bytes - done));
        uint64_t eight = bw_pdep(stream, mask);
        memcpy(codes + i, &eight, (size_t)(n - i));
    }
    return (1 << bits) - 1; /* no bit pattern lies outside */
}
