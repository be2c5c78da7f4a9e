/* AVX-512 F+BW+DQ+VL+VBMI+VNNI (Ice Lake 2019, Zen 4 2022 and later): 16 lanes in one register. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "../codec/trellis.h"
#include "../float16.h"
#include "../kernels/table.h"
#include "../scheme.h"

#ifdef __clang__
#pragma clang attribute push(                                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi2,popcnt")
#endif

typedef __m512 bw_vf;

static inline bw_vf bw_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static inline void bw_store(float *p, bw_vf x) {
    _mm512_storeu_ps(p, x);
}
static inline bw_vf bw_load_f16(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline bw_vf bw_load_bf16(const void *p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
static inline bw_vf bw_load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void bw_store_f16(void *p, bw_vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
/* Nearest, ties to even; NaN keeps its top bits and becomes quiet. */
static inline void bw_store_bf16(void *p, bw_vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void bw_store_u8(uint8_t *p, bw_vf x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
static inline bw_vf bw_set(float x) {
    return _mm512_set1_ps(x);
}
static inline bw_vf bw_add(bw_vf x, bw_vf y) {
    return _mm512_add_ps(x, y);
}
static inline bw_vf bw_sub(bw_vf x, bw_vf y) {
    return _mm512_sub_ps(x, y);
}
static inline bw_vf bw_mul(bw_vf x, bw_vf y) {
    return _mm512_mul_ps(x, y);
}
static inline bw_vf bw_div(bw_vf x, bw_vf y) {
    return _mm512_div_ps(x, y);
}
static inline bw_vf bw_fma(bw_vf x, bw_vf y, bw_vf z) {
    return _mm512_fmadd_ps(x, y, z);
}
static inline bw_vf bw_min(bw_vf x, bw_vf y) {
    return _mm512_min_ps(x, y);
}
static inline bw_vf bw_max(bw_vf x, bw_vf y) {
    return _mm512_max_ps(x, y);
}
/* a < b ? x : y, lane by lane. */
static inline bw_vf bw_select_less(bw_vf a, bw_vf b, bw_vf x, bw_vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline bw_vf bw_rint(bw_vf x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 2^n for whole n in -127 .. 127 (2^-127 gives 0); anything for other n. */
static inline bw_vf bw_pow2(bw_vf n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

/* x[lanes[i]] for each lane; lanes below 8. */
static inline bw_vf bw_spread(bw_vf x, const int32_t *lanes) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), x);
}
/* Lanes i and i + 8 to eight. */
#define HALVES(op, x) _mm256_##op##_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))
/* Each of four vectors folded to one number, in the order of FOLD. */
#define FOLD_FOUR(op)                                                                                      \
    bw_vf halves[2] = {                                                                                    \
        _mm512_##op##_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee)),  \
        _mm512_##op##_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee))}; \
    bw_vf fours = _mm512_##op##_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),                       \
                                   _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));                      \
    bw_vf twos = _mm512_##op##_ps(fours, _mm512_permute_ps(fours, 0x4e));                                  \
    bw_vf ones = _mm512_##op##_ps(twos, _mm512_permute_ps(twos, 0xb1));                                    \
    __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);                   \
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, ones)))
#include "folds.h"

/* 64 codes, one a byte. A dense reader: the byte where eight codes start, then the bit of each code within them. */
typedef __m512i bw_codes;
typedef struct {
    __m512i index, shift, mask;
} bw_reader;
typedef struct {
    __m512i bytes, fifth;
} bw_span;

static inline bw_reader bw_read_dense(int bits) {
    const __m512i eighth = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i start = _mm512_mullo_epi64(eighth, _mm512_set1_epi64(bits * 0x0101010101010101));
    return (bw_reader){_mm512_add_epi8(start, _mm512_set1_epi64(0x0706050403020100)),
                       _mm512_set1_epi64(bits * 0x0706050403020100), _mm512_set1_epi8((char)((1 << bits) - 1))};
}
static inline bw_span bw_open_dense(const uint8_t *p, const bw_reader *reader) {
    (void)reader;
    return (bw_span){_mm512_loadu_si512(p), _mm512_setzero_si512()};
}
static inline bw_codes bw_take_dense(const bw_span *span, const bw_reader *reader) {
    __m512i eight = _mm512_permutexvar_epi8(reader->index, span->bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(reader->shift, eight), reader->mask);
}

/* Packing a unit: neighbours join into pairs, fours, eights; then the filled bytes of each eight move together, byte i
 * from where its bits lie. */
#define PLACE1(bits, i) (i) / (bits) % 8 * 8 + (i) % (bits)
#define PLACE4(bits, i) PLACE1(bits, i), PLACE1(bits, i + 1), PLACE1(bits, i + 2), PLACE1(bits, i + 3)
#define PLACE16(bits, i) PLACE4(bits, i), PLACE4(bits, i + 4), PLACE4(bits, i + 8), PLACE4(bits, i + 12)
#define PLACE64(bits) {PLACE16(bits, 0), PLACE16(bits, 16), PLACE16(bits, 32), PLACE16(bits, 48)}
static const uint8_t filled_bytes[6][64] = {PLACE64(1), PLACE64(2), PLACE64(3), PLACE64(4), PLACE64(5), PLACE64(6)};
static inline ptrdiff_t bw_pack_units(const uint8_t *codes, ptrdiff_t n, int bits, uint8_t *packed) {
    if (bits > 6) return 0; /* a pair's upper weight would not fit into a signed byte */
    const __m512i pair = _mm512_set1_epi16((short)(1 | 1 << (bits + 8)));
    const __m512i four = _mm512_set1_epi32(1 | 1 << (2 * bits + 16));
    const __m512i lower = _mm512_set1_epi64(0xffffffff);
    const __m128i down = _mm_cvtsi32_si128(32 - 4 * bits);
    const __m512i place = _mm512_loadu_si512(filled_bytes[bits - 1]);
    ptrdiff_t i = 0, done = 0, room = (n * bits + 7) / 8 - 64; /* whole registers, overwritten by the next */
    for (; i + 64 <= n && done <= room; i += 64, done += 8 * bits) {
        __m512i fours = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_loadu_si512(codes + i), pair), four);
        __m512i upper = _mm512_srl_epi64(_mm512_andnot_si512(lower, fours), down);
        __m512i eights = _mm512_or_si512(_mm512_and_si512(fours, lower), upper);
        _mm512_storeu_si512(packed + done, _mm512_permutexvar_epi8(place, eights));
    }
    return i;
}
static inline ptrdiff_t bw_unpack_units(const uint8_t *packed, ptrdiff_t n, int bits, uint8_t *codes) {
    const bw_reader reader = bw_read_dense(bits);
    ptrdiff_t i = 0, done = 0, room = (n * bits + 7) / 8 - 64;
    for (; i + 64 <= n && done <= room; i += 64, done += 8 * bits) {
        bw_span span = bw_open_dense(packed + done, &reader);
        _mm512_storeu_si512(codes + i, bw_take_dense(&span, &reader));
    }
    return i;
}

/* Ternary: 64 bytes hold 320 codes. Tables turn each byte into its first four digits, 2 bits each, beside the fifth
 * digit; the unit k then picks byte and digit of each of its codes. */
#define DIGITS1(x) x, x + 1, x + 2
#define DIGITS2(x) DIGITS1(x), DIGITS1(x + 4), DIGITS1(x + 8)
#define DIGITS3(x) DIGITS2(x), DIGITS2(x + 16), DIGITS2(x + 32)
#define DIGITS4(x) DIGITS3(x), DIGITS3(x + 64), DIGITS3(x + 128)
static const uint8_t four_digits[256] = {DIGITS4(0), DIGITS4(0), DIGITS4(0)};
#define PICK1(b) b, b, b, b, 64 + b
#define PICK4(b) PICK1(b), PICK1(b + 1), PICK1(b + 2), PICK1(b + 3)
#define PICK16(b) PICK4(b), PICK4(b + 4), PICK4(b + 8), PICK4(b + 12)
static const uint8_t pick_digit[320] = {PICK16(0), PICK16(16), PICK16(32), PICK16(48)};
#define SHIFT5(b) 8 * ((b) % 8), 8 * ((b + 1) % 8) + 2, 8 * ((b + 2) % 8) + 4, 8 * ((b + 3) % 8) + 6, 8 * ((b + 4) % 8)
#define SHIFT20(b) SHIFT5(b), SHIFT5(b + 5), SHIFT5(b + 10), SHIFT5(b + 15)
static const uint8_t shift_digit[120] = {SHIFT20(0), SHIFT20(20), SHIFT20(40), SHIFT20(60), SHIFT20(80), SHIFT20(100)};

static inline bw_reader bw_read_ternary(void) {
    return (bw_reader){.mask = _mm512_set1_epi8(3)};
}
static inline bw_span bw_open_ternary(const uint8_t *p) {
    __m512i v = _mm512_loadu_si512(p), one = _mm512_set1_epi8(1);
    __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(four_digits), v, _mm512_loadu_si512(four_digits + 64));
    __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(four_digits + 128), v, _mm512_loadu_si512(four_digits + 192));
    __mmask64 some = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8(80)),
              two = _mm512_cmpgt_epu8_mask(v, _mm512_set1_epi8((char)161));
    __m512i fifth = _mm512_maskz_mov_epi8(some, one);
    return (bw_span){_mm512_mask_blend_epi8(_mm512_movepi8_mask(v), low, high),
                     _mm512_mask_add_epi8(fifth, two, fifth, one)};
}
static inline bw_codes bw_take_ternary(const bw_span *span, int k, const bw_reader *reader) {
    __m512i pick = _mm512_loadu_si512(pick_digit + 64 * k), shift = _mm512_loadu_si512(shift_digit + 64 * k % 40);
    __m512i digits = _mm512_permutex2var_epi8(span->bytes, pick, span->fifth);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, digits), reader->mask);
}

/* Codes 16k .. 16k+15 as numbers. */
static inline bw_vf bw_code_floats(bw_codes codes, int k) {
    __m128i sixteen = k == 0   ? _mm512_castsi512_si128(codes)
                      : k == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                      : k == 2 ? _mm512_extracti32x4_epi32(codes, 2)
                               : _mm512_extracti32x4_epi32(codes, 3);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen));
}
/* 64 whole numbers: signed bytes, or the upper bytes and then the lower ones, both signed. */
static inline void bw_store_digits(void *record, const bw_vf *whole, int digits, int order) {
    (void)order;
    for (int k = 0; k < 4; k++) {
        __m512i n = _mm512_cvtps_epi32(whole[k]);
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
        if (digits == 2) _mm_storeu_si128((__m128i *)record + 4 + k, _mm512_cvtepi32_epi8(n));
        _mm_storeu_si128((__m128i *)record + k, _mm512_cvtepi32_epi8(digits == 2 ? upper : n));
    }
}
/* Sums of four products a lane: codes times whole numbers. */
static inline bw_vf bw_dot(bw_codes codes, const char *record, int digits) {
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(record));
    if (digits == 2) sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), codes, _mm512_loadu_si512(record + 64));
    return _mm512_cvtepi32_ps(sum);
}

/* 32 whole numbers of 16 bits, for the search of trellis paths: signed for values, unsigned for costs. */
typedef __m512i bw_w16;

static inline bw_w16 bw_load16(const void *p) {
    return _mm512_loadu_si512(p);
}
static inline void bw_store16(void *p, bw_w16 x) {
    _mm512_storeu_si512(p, x);
}
static inline bw_w16 bw_set16(int x) {
    return _mm512_set1_epi16((short)x);
}
static inline bw_w16 bw_subs16(bw_w16 x, bw_w16 y) { /* signed, saturating */
    return _mm512_subs_epi16(x, y);
}
static inline bw_w16 bw_adds16(bw_w16 x, bw_w16 y) { /* signed, saturating */
    return _mm512_adds_epi16(x, y);
}
static inline bw_w16 bw_mul16(bw_w16 x, bw_w16 y) { /* x y / 2^15, rounded; 2^15 (unsigned) for both at -2^15 */
    return _mm512_mulhrs_epi16(x, y);
}
static inline bw_w16 bw_addu16(bw_w16 x, bw_w16 y) { /* unsigned, saturating */
    return _mm512_adds_epu16(x, y);
}
static inline bw_w16 bw_minu16(bw_w16 x, bw_w16 y) {
    return _mm512_min_epu16(x, y);
}
static inline bw_w16 bw_sub16(bw_w16 x, bw_w16 y) { /* modulo 2^16 */
    return _mm512_sub_epi16(x, y);
}
/* Lane i = p[i >> rate]; up to 16 numbers are read. */
static inline bw_w16 bw_repeat16(const uint16_t *p, int rate) {
    if (rate == 5) return bw_set16(*p);
    const __m512i lanes =
        _mm512_set_epi64(0x001f001e001d001c, 0x001b001a00190018, 0x0017001600150014, 0x0013001200110010,
                         0x000f000e000d000c, 0x000b000a00090008, 0x0007000600050004, 0x0003000200010000);
    __m512i index = _mm512_srli_epi16(lanes, (unsigned)rate);
    if (rate == 1)
        return _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)p)));
    index = _mm512_add_epi16(_mm512_mullo_epi16(index, _mm512_set1_epi16(0x0202)), _mm512_set1_epi16(0x0100));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)), index);
}
static inline int bw_least16(bw_w16 x) {
    __m256i y = _mm256_min_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_min_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return _mm_cvtsi128_si32(_mm_minpos_epu16(z)) & 0xffff;
}

/* Rows, `stride` apart, of 16 columns of 16 numbers. */
static inline void bw_transpose16(const float *columns, float *rows, ptrdiff_t stride) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(columns + 16 * i);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d even = _mm512_castps_pd(t[i + j]), odd = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    for (int j = 0; j < 4; j++) { /* a quarter q of r[4i + j] is row 4q + j, columns 4i .. 4i+3 */
        __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        __m512 c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_ps(rows + j * stride, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_storeu_ps(rows + (4 + j) * stride, _mm512_shuffle_f32x4(c, d, 0x88));
        _mm512_storeu_ps(rows + (8 + j) * stride, _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_storeu_ps(rows + (12 + j) * stride, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
}

/* Sixteen states of a trellis at once, one a row of a column; a hash is four bytes a lane. */
typedef __m512i bw_hash;
typedef struct {
    __m512i pick, shift, mask, multiplier, addend;
} bw_windows;

/* The window of row r ends rate * (15 - r) bits before the end of the column's bytes, which count from the top. */
static inline bw_windows bw_read_windows(int rate, int width) {
    uint8_t pick[64];
    int32_t shift[16];
    for (int r = 0; r < 16; r++) {
        int below = rate * (15 - r);
        shift[r] = below & 7;
        for (int b = 0; b < 4; b++) pick[4 * r + b] = (uint8_t)(15 - below / 8 - b);
    }
    return (bw_windows){_mm512_loadu_si512(pick), _mm512_loadu_si512(shift), _mm512_set1_epi32((1 << width) - 1),
                        _mm512_set1_epi32((int)bw_trellis_multiplier(width)),
                        _mm512_set1_epi32((int)bw_trellis_addend(width))};
}
/* From the 16 bytes before `end`. */
static inline bw_hash bw_hash_column(const uint8_t *end, const bw_windows *w) {
    __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(end - 16)));
    __m512i states = _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, w->pick), w->shift), w->mask);
    return _mm512_add_epi32(_mm512_mullo_epi32(states, w->multiplier), w->addend);
}
/* Sums in whole numbers of 32 bits. */
typedef __m512i bw_w32;
enum { DIGIT_PLANES = 2 }; /* numbers of 16 bits are taken byte by byte */

static inline bw_w32 bw_set32(int32_t x) {
    return _mm512_set1_epi32(x);
}
static inline bw_vf bw_float32(bw_w32 x) {
    return _mm512_cvtepi32_ps(x);
}
static inline bw_w32 bw_add32(bw_w32 x, bw_w32 y) {
    return _mm512_add_epi32(x, y);
}
static inline bw_w32 bw_join32(bw_w32 high, bw_w32 low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
/* A whole number as bw_dot_hash takes it; plane 0 is the upper digit where there are two. */
static inline int32_t bw_digit(int32_t n, int digits, int plane) {
    int32_t digit = digits == 2 && plane == 0 ? (n + 128) >> 8 : n;
    return (int32_t)((uint32_t)(digit & 255) * 0x01010101u);
}
/* sum + (sum of the hash's bytes) * x */
static inline bw_w32 bw_dot_hash(bw_w32 sum, bw_hash hash, int32_t x) {
    return _mm512_dpbusd_epi32(sum, hash, _mm512_set1_epi32(x));
}

#include "../kernels/all.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

const bw_isa bw_isa_avx512 = BW_TABLE("avx512", 20, supported);
