// The engine's kernels for CPUs: attention over paged KV, where blocks are read where they lie, and whole steps of a
// model with it. A plain C interface, called through ctypes (engine/native.py); knows no Python and no torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")  // or an array of vectors stays in memory
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross the interface

namespace {

struct bfloat16 {
  uint16_t bits;
};
struct Pair {  // of bfloat16, the first in the lower half
  uint32_t bits;
};

// Strides and offsets are in elements. `engine/native.py` declares the same fields in the same order.
struct AttentionArgs {
  const void* q;               // [rows, num_heads, head_dim], q_stride between rows
  const void* cache;           // one layer: [blocks][k/v][block_size][num_kv_heads][head_dim], block_stride between blocks
  void* out;                   // as q, out_stride between rows
  const int64_t* query_starts; // of each sequence: the row in q and out of its first query
  const int64_t* query_lens;
  const int64_t* context_lens; // keys that its last query sees, those of this step among them
  const int64_t* table_starts;
  const int64_t* block_tables;
  int64_t q_stride, out_stride, block_stride, value_offset, block_size, num_sequences;
  int64_t window;              // a query at p sees the keys in (p - window, p]
  int32_t num_heads, num_kv_heads, head_dim, num_threads;
  float scale;
};

struct Linear {
  const void* weight;  // packed, see linear.inc
  const float* bias;   // [outputs, up to a whole panel] or null
  int64_t in, out;
};

struct LinearArgs {
  Linear linear;
  const void* x;
  float* y;
  int64_t rows;
  int32_t num_threads;
};

struct LayerArgs {
  const void *input_norm, *post_norm;
  const void *q_norm, *k_norm;  // null where heads are not normalised
  Linear qkv, o, gate_up, down;
  int64_t window;
};

struct StepArgs {
  AttentionArgs attention;  // cache: the first layer's; q, out, their strides and window are the layers' own
  const LayerArgs* layers;
  Linear head;
  const void *embedding, *norm;  // the embedding is packed as a weight of [vocab][hidden]
  const int64_t *token_ids, *slots, *logits_rows;  // the rows ascend, as their sequences do
  const void *cos, *sin;  // [tokens, head_dim]
  void* workspace;        // for each token: three rows of hidden, two of attention's output, one each of qkv and
                          // intermediate; and room for 31 tokens more
  float* logits;          // [logits rows, vocab]
  int64_t num_layers, num_tokens, num_logits, hidden, layer_stride;
  float eps;
};

// See attention.inc.
struct AttentionItem {
  int64_t sequence, first_token;  // of those of the step
  int tokens, kv_head, num_kv_heads;
  int64_t begin, end;  // keys
  int64_t state;       // the first of its states, or -1: what it computes is the output
};
struct Splits {
  int64_t sequence, first_state, count;
};
struct AttentionPlan {
  int64_t window;
  std::vector<AttentionItem> items;
  std::vector<Splits> splits;
  int64_t num_states;
};

constexpr int64_t kSplit = 512;  // keys of one item of a single query
constexpr int kItemRows = 192;   // about, of a prompt's item: what laying out keys and values costs is shared by them

void plan_prompt(const AttentionArgs& a, int64_t sequence, AttentionPlan& plan) {
  const int tokens = std::max(1, kItemRows * a.num_kv_heads / a.num_heads);
  for (int64_t end = a.query_lens[sequence]; end > 0; end -= tokens)  // the longest first, or threads wait for them
    for (int head = 0; head < a.num_kv_heads; ++head) {
      const int64_t first = std::max(int64_t(0), end - tokens);
      plan.items.push_back({sequence, first, int(end - first), head, 1, 0, a.context_lens[sequence], -1});
    }
}

void plan_single(const AttentionArgs& a, int64_t sequence, AttentionPlan& plan) {
  const int64_t context = a.context_lens[sequence], first_state = plan.num_states;
  const int64_t first = std::max(int64_t(0), context - a.window) / kSplit;
  const int64_t count = (context + kSplit - 1) / kSplit - first;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = (first + i) * kSplit, end = std::min(context, begin + kSplit);
    const int64_t state = count == 1 ? -1 : first_state + i * a.num_heads;
    plan.items.push_back({sequence, 0, 1, 0, a.num_kv_heads, begin, end, state});
  }
  if (count == 1) return;
  plan.splits.push_back({sequence, first_state, count});
  plan.num_states += count * a.num_heads;
}

AttentionPlan plan_attention(const AttentionArgs& a) {
  AttentionPlan plan = {a.window, {}, {}, 0};
  for (int64_t i = 0; i < a.num_sequences; ++i)
    if (a.query_lens[i] > 1) plan_prompt(a, i, plan);
  for (int64_t i = 0; i < a.num_sequences; ++i)
    if (a.query_lens[i] == 1) plan_single(a, i, plan);
  return plan;
}

// For each instruction set: the floats of one register, their numbers, whether it has dot products of bfloat16, and
// whether it has registers that hold matrices of them.
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#define BFLOAT16_DOT
#define MATRIX_REGISTERS
namespace amx {
constexpr int kWidth = 16;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#include "all.inc"
#undef LANES
}
#undef MATRIX_REGISTERS
#undef BFLOAT16_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define BFLOAT16_DOT
namespace avx512_bf16 {
constexpr int kWidth = 16;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#include "all.inc"
#undef LANES
}
#undef BFLOAT16_DOT
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
constexpr int kWidth = 16;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#include "all.inc"
#undef LANES
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kWidth = 8;
#define LANES 0, 1, 2, 3, 4, 5, 6, 7
#include "all.inc"
#undef LANES
}
#pragma GCC pop_options
#endif
namespace portable {
constexpr int kWidth = 4;
#define LANES 0, 1, 2, 3
#include "all.inc"
#undef LANES
}

// Calls `function<T>(args)` of an instruction set.
#if defined(__x86_64__)
#define CALL(function, T, args, isa)                  \
  (isa == 4   ? amx::function<T>(args)                \
   : isa == 3 ? avx512_bf16::function<T>(args)        \
   : isa == 2 ? avx512::function<T>(args)             \
   : isa == 1 ? avx2::function<T>(args)               \
              : portable::function<T>(args))
#else
#define CALL(function, T, args, isa) portable::function<T>(args)
#endif

// Whether there are matrix registers and Linux lets this process have them, which it must be asked for.
bool may_use_matrix_registers() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// The widest instruction set that this machine and this build both have: 4 AVX-512 with AMX, 3 AVX-512 with BF16,
// 2 AVX-512, 1 AVX2, 0 portable code.
int32_t baton_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? 2 : may_use_matrix_registers() ? 4 : 3;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// dtype: 0 float32, 1 bfloat16.
void baton_attention(const AttentionArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    CALL(attend_all, float, *args, isa);
  else
    CALL(attend_all, bfloat16, *args, isa);
}

void baton_linear(const LinearArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    CALL(run_linear, float, *args, isa);
  else
    CALL(run_linear, bfloat16, *args, isa);
}

void baton_step(const StepArgs* args, int32_t dtype, int32_t isa) {
  if (dtype == 0)
    CALL(run_step, float, *args, isa);
  else
    CALL(run_step, bfloat16, *args, isa);
}
}
