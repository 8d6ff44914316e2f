/* The native twins of `sum_blocks` and `are_sound` in `forebay_core.checksums`: XXH3-64, seed 0, of 4096-byte blocks, as the specification of
   xxHash has it (github.com/Cyan4973/xxHash, doc/xxhash_spec.md) for inputs of more than 240 bytes.

   For x86-64 with AVX2 only: elsewhere it is not built, or refuses to be imported, and the twin does the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define BLOCK_SIZE 4096
#define STRIPE_SIZE 64
#define STRIPES_PER_ROUND 16 /* (192 - 64) / 8: the secret is shifted by 8 bytes for each stripe */
#define ROUND_SIZE (STRIPES_PER_ROUND * STRIPE_SIZE)
#define SECRET_SIZE 192

static const uint32_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u;
static const uint64_t PRIME_MX1 = 0x165667919E3779F9u;

static const uint8_t secret[SECRET_SIZE] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i load(const uint8_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

/* Mix 32 bytes into four of the eight lanes. */
AVX2 static inline __m256i mix(__m256i lanes, const uint8_t *input, const uint8_t *key)
{
    const __m256i data = load(input);
    const __m256i keyed = _mm256_xor_si256(data, load(key));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(product, _mm256_add_epi64(lanes, _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2))));
}

AVX2 static inline __m256i scramble(__m256i lanes, const uint8_t *key)
{
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    const __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), load(key));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

static uint64_t fold(uint64_t first, uint64_t second, const uint8_t *key)
{
    uint64_t keys[2];
    memcpy(keys, key, sizeof keys);
    const unsigned __int128 product = (unsigned __int128)(first ^ keys[0]) * (second ^ keys[1]);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

AVX2 static uint64_t sum(const uint8_t *block)
{
    __m256i low = _mm256_set_epi64x((int64_t)PRIME64_3, (int64_t)PRIME64_2, (int64_t)PRIME64_1, PRIME32_3);
    __m256i high = _mm256_set_epi64x(PRIME32_1, (int64_t)PRIME64_5, PRIME32_2, (int64_t)PRIME64_4);
    for (int at = 0; at < BLOCK_SIZE; at += ROUND_SIZE) {
        const int last = at + ROUND_SIZE == BLOCK_SIZE; /* its last stripe has a key of its own */
        for (int stripe = 0; stripe < STRIPES_PER_ROUND - last; stripe++) {
            const uint8_t *const input = block + at + stripe * STRIPE_SIZE;
            low = mix(low, input, secret + stripe * 8);
            high = mix(high, input + 32, secret + stripe * 8 + 32);
        }
        if (!last) {
            low = scramble(low, secret + SECRET_SIZE - STRIPE_SIZE);
            high = scramble(high, secret + SECRET_SIZE - STRIPE_SIZE + 32);
        }
    }
    low = mix(low, block + BLOCK_SIZE - STRIPE_SIZE, secret + SECRET_SIZE - STRIPE_SIZE - 7);
    high = mix(high, block + BLOCK_SIZE - STRIPE_SIZE + 32, secret + SECRET_SIZE - STRIPE_SIZE - 7 + 32);
    uint64_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, low);
    _mm256_storeu_si256((__m256i *)(lanes + 4), high);
    uint64_t found = BLOCK_SIZE * PRIME64_1;
    for (int i = 0; i < 4; i++)
        found += fold(lanes[2 * i], lanes[2 * i + 1], secret + 11 + 16 * i);
    found ^= found >> 37;
    found *= PRIME_MX1;
    return found ^ found >> 32;
}

typedef struct {
    Py_buffer blocks, sums;
} pair_t;

static void release(pair_t *pair)
{
    PyBuffer_Release(&pair->sums);
    PyBuffer_Release(&pair->blocks);
}

/* Get whole blocks and as many sums from two arguments; -1 with an exception set. */
static int take(PyObject *const *arguments, Py_ssize_t given, int sums_flag, pair_t *pair)
{
    if (given != 2) {
        PyErr_SetString(PyExc_TypeError, "2 arguments were expected");
        return -1;
    }
    if (PyObject_GetBuffer(arguments[0], &pair->blocks, PyBUF_SIMPLE) < 0)
        return -1;
    if (PyObject_GetBuffer(arguments[1], &pair->sums, sums_flag) < 0) {
        PyBuffer_Release(&pair->blocks);
        return -1;
    }
    if (pair->blocks.len % BLOCK_SIZE == 0 && pair->sums.len == pair->blocks.len / BLOCK_SIZE * 8)
        return 0;
    PyErr_SetString(PyExc_ValueError, "whole blocks and 8 bytes for each were expected");
    release(pair);
    return -1;
}

static PyObject *sum_blocks(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    pair_t pair;
    (void)module;
    if (take(arguments, given, PyBUF_WRITABLE, &pair) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < pair.blocks.len / BLOCK_SIZE; i++) {
        const uint64_t found = sum((const uint8_t *)pair.blocks.buf + i * BLOCK_SIZE);
        memcpy((char *)pair.sums.buf + i * 8, &found, 8);
    }
    release(&pair);
    Py_RETURN_NONE;
}

static PyObject *are_sound(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    pair_t pair;
    int sound = 1;
    (void)module;
    if (take(arguments, given, PyBUF_SIMPLE, &pair) < 0)
        return NULL;
    for (Py_ssize_t i = 0; i < pair.blocks.len / BLOCK_SIZE && sound; i++) {
        const uint64_t found = sum((const uint8_t *)pair.blocks.buf + i * BLOCK_SIZE);
        sound = memcmp((const char *)pair.sums.buf + i * 8, &found, 8) == 0;
    }
    release(&pair);
    return PyBool_FromLong(sound);
}

static PyMethodDef methods[] = {
    {"are_sound", (PyCFunction)(void (*)(void))are_sound, METH_FASTCALL, NULL},
    {"sum_blocks", (PyCFunction)(void (*)(void))sum_blocks, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "forebay_core._sums", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__sums(void)
{
    if (!__builtin_cpu_supports("avx2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no AVX2");
        return NULL;
    }
    return PyModule_Create(&definition);
}
