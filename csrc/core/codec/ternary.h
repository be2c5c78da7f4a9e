/* Ternary codes 0, 1, 2: five a byte, base 3, the first code is the least significant digit.
 *
 *   byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4      (0 .. 242; larger bytes are invalid)
 */

static void ternary_pack(const uint8_t *codes, ptrdiff_t n, uint8_t *packed) {
    for (ptrdiff_t i = 0; i < n; i += 5) {
        int byte = 0;
        for (ptrdiff_t j = n - i < 5 ? n - i : 5; j-- > 0;) byte = byte * 3 + codes[i + j];
        packed[i / 5] = (uint8_t)byte;
    }
}

static int ternary_unpack(const uint8_t *packed, ptrdiff_t n, uint8_t *codes) {
    int largest = 0;
    for (ptrdiff_t i = 0; i < n; i += 5) {
        unsigned rest = packed[i / 5];
        largest = rest > 242 ? 3 : largest;
        for (ptrdiff_t j = 0; j < 5 && i + j < n; j++) {
            unsigned third = rest * 171u >> 9; /* rest / 3 for rest < 256 */
            codes[i + j] = (uint8_t)(rest - 3 * third);
            rest = third;
        }
    }
    return largest;
}
