// Attention over paged KV on the CPU: blocks are read where they lie. Two kernels, for decode steps and for prompts.
// A plain C interface, called through ctypes (engine/native.py); knows no Python and no torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // or an array of vectors stays in memory
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross the interface

namespace {

struct bfloat16 {
  uint16_t bits;
};

// Strides and offsets are in elements. `engine/native.py` declares the same fields in the same order.
struct AttentionArgs {
  const void* q;               // [rows, num_heads, head_dim], q_stride between rows
  const void* cache;           // one layer: [blocks][k/v][block_size][num_kv_heads][head_dim], block_stride between blocks
  void* out;                   // as q, out_stride between rows
  const int64_t* query_starts; // of each sequence: the row in q and out of its first query
  const int64_t* query_lens;   // all 1 for the decode kernel
  const int64_t* context_lens; // keys that its last query sees, those of this step among them
  const int64_t* table_starts;
  const int64_t* block_tables;
  int64_t q_stride, out_stride, block_stride, value_offset, block_size, num_sequences;
  int64_t window;              // a query at p sees the keys in (p - window, p]
  int32_t num_heads, num_kv_heads, head_dim, num_threads;
  float scale;
};

struct WorkItem {
  int64_t sequence;
  int64_t begin, end;  // keys
};

struct PromptItem {
  int64_t sequence, first_token;  // of those of the step
  int tokens, kv_head;
};

// For each instruction set: the floats of one register, their numbers, and whether it has dot products of bfloat16.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define BFLOAT16_DOT
namespace avx512_bf16 {
constexpr int kWidth = 16;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#include "vectors.inc"
#include "paged_attention.inc"
#include "prompt_attention.inc"
#undef LANES
}
#undef BFLOAT16_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
constexpr int kWidth = 16;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#include "vectors.inc"
#include "paged_attention.inc"
#include "prompt_attention.inc"
#undef LANES
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kWidth = 8;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7
#include "vectors.inc"
#include "paged_attention.inc"
#include "prompt_attention.inc"
#undef LANES
}
#pragma GCC pop_options
#endif
namespace portable {
constexpr int kWidth = 4;
#define LANES 0, 1, 2, 3
#include "vectors.inc"
#include "paged_attention.inc"
#include "prompt_attention.inc"
#undef LANES
}

template <class T>
void decode(const AttentionArgs& args, int isa) {
#if defined(__x86_64__)
  if (isa == 3) return avx512_bf16::decode_attention<T>(args);
  if (isa == 2) return avx512::decode_attention<T>(args);
  if (isa == 1) return avx2::decode_attention<T>(args);
#endif
  portable::decode_attention<T>(args);
}

template <class T>
void prompt(const AttentionArgs& args, int isa) {
#if defined(__x86_64__)
  if (isa == 3) return avx512_bf16::prompt_attention<T>(args);
  if (isa == 2) return avx512::prompt_attention<T>(args);
  if (isa == 1) return avx2::prompt_attention<T>(args);
#endif
  portable::prompt_attention<T>(args);
}

}  // namespace

extern "C" {

// The widest instruction set that this machine and this build both have: 3 AVX-512 with BF16, 2 AVX-512, 1 AVX2,
// 0 portable code.
int32_t baton_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// dtype: 0 float32, 1 bfloat16.
void baton_decode_attention(const AttentionArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    decode<float>(*args, isa);
  else
    decode<bfloat16>(*args, isa);
}

void baton_prompt_attention(const AttentionArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    prompt<float>(*args, isa);
  else
    prompt<bfloat16>(*args, isa);
}
}
