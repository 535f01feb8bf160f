// Copies of blocks that do not pass through the caches, and their XXH3-64 on the way: each byte is read once.
//
// A block is larger than what a core keeps near, and nobody reads it again soon. An ordinary store first reads the
// line that it overwrites; a non-temporal one does not, which is a third of the traffic. XXH3 is Yann Collet's
// (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); here it is for inputs of more than 240 bytes, without a seed.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

enum { STRIPE = 64, LANES = 8, SECRET = 192, STRIPES_PER_BLOCK = (SECRET - STRIPE) / 8 };
enum { AHEAD = 8192 };  // bytes from what is read to what is asked for; the processor itself looks no further than a page

static const uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u;

static const uint8_t secret[SECRET] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71,
    0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3,
    0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8,
    0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa,
    0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b,
    0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95,
    0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t load64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static void scramble(uint64_t *sums, const uint8_t *key) {
    for (int i = 0; i < LANES; ++i) sums[i] = (sums[i] ^ sums[i] >> 47 ^ load64(key + 8 * i)) * PRIME32_1;
}

static uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merge(const uint64_t *sums, uint64_t length) {
    const uint8_t *key = secret + 11;
    uint64_t hash = length * PRIME64_1;
    for (int i = 0; i < LANES; i += 2) hash += fold(sums[i] ^ load64(key + 8 * i), sums[i + 1] ^ load64(key + 8 * i + 8));
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9u;
    return hash ^ hash >> 32;
}

// One stripe: `to` gets the bytes of `from` (unless it is null), `sums` what they add.
typedef void (*Stripes)(uint8_t *to, const uint8_t *from, const uint8_t *key, uint64_t *sums, int count);

static void stripes_portable(uint8_t *to, const uint8_t *from, const uint8_t *key, uint64_t *sums, int count) {
    for (int s = 0; s < count; ++s, from += STRIPE, key += 8) {
        for (int i = 0; i < LANES; ++i) {
            const uint64_t data = load64(from + 8 * i), mixed = data ^ load64(key + 8 * i);
            sums[i ^ 1] += data;
            sums[i] += (mixed & 0xFFFFFFFFu) * (mixed >> 32);
        }
        if (to) memcpy(to + (size_t)s * STRIPE, from, STRIPE);
    }
}

#if HAS_X86
__attribute__((target("avx2"))) static void stripes_avx2(
    uint8_t *to, const uint8_t *from, const uint8_t *key, uint64_t *sums, int count) {
    __m256i sum[2] = {_mm256_loadu_si256((__m256i *)sums), _mm256_loadu_si256((__m256i *)sums + 1)};
    for (int s = 0; s < count; ++s, from += STRIPE, key += 8) {
        for (int h = 0; h < 2; ++h) {
            const __m256i data = _mm256_loadu_si256((const __m256i *)from + h);
            const __m256i mixed = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)key + h));
            const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
            sum[h] = _mm256_add_epi64(sum[h], _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4E)));
            if (to) _mm256_stream_si256((__m256i *)(to + (size_t)s * STRIPE) + h, data);
        }
    }
    _mm256_storeu_si256((__m256i *)sums, sum[0]);
    _mm256_storeu_si256((__m256i *)sums + 1, sum[1]);
}

__attribute__((target("avx512f"))) static void stripes_avx512(
    uint8_t *to, const uint8_t *from, const uint8_t *key, uint64_t *sums, int count) {
    __m512i sum = _mm512_loadu_si512(sums);
    for (int s = 0; s < count; ++s, from += STRIPE, key += 8) {
        const __m512i data = _mm512_loadu_si512(from), mixed = _mm512_xor_si512(data, _mm512_loadu_si512(key));
        const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
        sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, (_MM_PERM_ENUM)0x4E)));
        if (to) _mm512_stream_si512((__m512i *)(to + (size_t)s * STRIPE), data);
    }
    _mm512_storeu_si512(sums, sum);
}

// Whole blocks of the hash: keys and sums stay in registers from one to the next.
__attribute__((target("avx512f"))) static void blocks_avx512(
    uint8_t *to, const uint8_t *from, uint64_t *sums, size_t count) {
    const __m512i last = _mm512_loadu_si512(secret + SECRET - STRIPE), prime = _mm512_set1_epi64(0x9E3779B1u);
    __m512i sum = _mm512_loadu_si512(sums), keys[STRIPES_PER_BLOCK];
    for (int s = 0; s < STRIPES_PER_BLOCK; ++s) keys[s] = _mm512_loadu_si512(secret + 8 * s);
    for (; count; --count) {
#pragma GCC unroll 16
        for (int s = 0; s < STRIPES_PER_BLOCK; ++s, from += STRIPE, to += STRIPE) {
            _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
            const __m512i data = _mm512_loadu_si512(from), mixed = _mm512_xor_si512(data, keys[s]);
            const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
            sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, (_MM_PERM_ENUM)0x4E)));
            _mm512_stream_si512((__m512i *)to, data);
        }
        // `scramble`; a product of 64 and 32 bits is two of 32.
        const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), last);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
        sum = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }
    _mm512_storeu_si512(sums, sum);
}

// `length` is whole stripes here.
__attribute__((target("avx512f"))) static void stream_avx512(uint8_t *to, const uint8_t *from, size_t length) {
#pragma GCC unroll 4
    for (size_t at = 0; at < length; at += STRIPE) _mm512_stream_si512((__m512i *)(to + at), _mm512_loadu_si512(from + at));
    _mm_sfence();
}

static void stream(uint8_t *to, const uint8_t *from, size_t length) {
    for (size_t at = 0; at < length; at += STRIPE)
        for (int i = 0; i < 4; ++i)
            _mm_stream_si128((__m128i *)(to + at) + i, _mm_loadu_si128((const __m128i *)(from + at) + i));
    _mm_sfence();
}
#endif

static Stripes stripes(void) {
#if HAS_X86
    if (__builtin_cpu_supports("avx512f")) return stripes_avx512;
    if (__builtin_cpu_supports("avx2")) return stripes_avx2;
#endif
    return stripes_portable;
}

static int is_aligned(const uint8_t *to) { return (uintptr_t)to % STRIPE == 0; }

// Copies `length` bytes past the caches; `to` and `from` do not overlap.
void baton_copy(uint8_t *to, const uint8_t *from, size_t length) {
    size_t whole = 0;
#if HAS_X86
    if (is_aligned(to)) {
        whole = length - length % STRIPE;
        (__builtin_cpu_supports("avx512f") ? stream_avx512 : stream)(to, from, whole);
    }
#endif
    memcpy(to + whole, from + whole, length - whole);
}

// The same, and XXH3-64 of the bytes. `length` is more than 240.
uint64_t baton_copy_and_sum(uint8_t *to, const uint8_t *from, size_t length) {
    uint64_t sums[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const Stripes add = is_aligned(to) ? stripes() : stripes_portable;
    const size_t block = STRIPE * STRIPES_PER_BLOCK, blocks = (length - 1) / block;
#if HAS_X86
    if (add == stripes_avx512) blocks_avx512(to, from, sums, blocks);
    const size_t first = add == stripes_avx512 ? blocks : 0;
#else
    const size_t first = 0;
#endif
    for (size_t b = first; b < blocks; ++b) {
        add(to + b * block, from + b * block, secret, sums, STRIPES_PER_BLOCK);
        scramble(sums, secret + SECRET - STRIPE);
    }
    const size_t at = blocks * block, rest = (length - 1 - at) / STRIPE;
    add(to + at, from + at, secret, sums, (int)rest);
    stripes_portable(NULL, from + length - STRIPE, secret + SECRET - STRIPE - 7, sums, 1);
    memcpy(to + at + rest * STRIPE, from + at + rest * STRIPE, length - at - rest * STRIPE);
#if HAS_X86
    _mm_sfence();  // who hears of the copy afterwards sees it
#else
    __atomic_thread_fence(__ATOMIC_RELEASE);
#endif
    return merge(sums, length);
}
