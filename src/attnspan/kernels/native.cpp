// Attention on a CPU by tiles: forward, backward and the attention that keys receive.
//
// A task is one tile of query rows, for all query heads of one KV head, so that a block of 64 keys
// is laid out once for all of them. Scores of a few rows at a time are made, turned into weights and
// used while they are in the L1 cache. Which keys a tile meets comes as ranges of keys (`some`,
// and `all`, where no mask is needed) and a small stack program that gives a row's mask as one
// 64-bit word per block. Softmax runs in base 2, online, in fp32.

#include "native.h"

#ifndef WRONG_BY  // tests build it wrong, to see that they would notice
#define WRONG_BY 0
#endif

namespace {

enum Op { ALL, NOTHING, DISTANCE, KEYS, QUERIES, SPAN, STRIDE, AND, OR, NOT };

struct Job {
  int64_t first_query, first_key, n, m, offset, tile;
  const int32_t *some_ptr, *some, *all_ptr, *all;
  const int64_t* code;
  int64_t operations;
  const void* const* tables;
};

// Which of the keys `from` to `from + 63` the query row `r` sees.
uint64_t mask_word(const Job& job, int64_t r, int64_t from) {
  static thread_local std::vector<uint64_t> held;
  if ((int64_t)held.size() < job.operations) held.resize(job.operations);
  uint64_t* stack = held.data();
  int top = -1;
  int64_t i = job.offset + r;
  for (int64_t at = 0; at < job.operations; at++) {
    int64_t a = job.code[3 * at + 1], b = job.code[3 * at + 2];
    switch (job.code[3 * at]) {
      case ALL: stack[++top] = ~0ull; break;
      case NOTHING: stack[++top] = 0; break;
      case DISTANCE: stack[++top] = bits_between(i - b + 1 - from + WRONG_BY, i - a + 1 - from); break;
      case KEYS: {
        const uint64_t* table = (const uint64_t*)job.tables[a] + from / 64;
        int shift = from % 64;
        stack[++top] = shift ? table[0] >> shift | table[1] << (64 - shift) : table[0];
        break;
      }
      case QUERIES: {
        const uint64_t* table = (const uint64_t*)job.tables[a];
        stack[++top] = table[r / 64] >> (r % 64) & 1 ? ~0ull : 0;
        break;
      }
      case SPAN: {
        const int32_t* table = (const int32_t*)job.tables[a] + 2 * r;
        stack[++top] = bits_between(table[0] - from, table[1] - from);
        break;
      }
      case STRIDE: {
        uint64_t word = 0;
        for (int64_t j = ((i - from) % a + a) % a; j < 64; j += a) word |= 1ull << j;
        stack[++top] = word;
        break;
      }
      case AND: top--; stack[top] &= stack[top + 1]; break;
      case OR: top--; stack[top] |= stack[top + 1]; break;
      case NOT: stack[top] = ~stack[top]; break;
    }
  }
  return stack[0];
}

struct Problem {
  View q, k, v, out, grad_out;
  float *lse, *grad_lse, *grad_q, *grad_k, *grad_v, *total;
  int64_t batch, heads, kv_heads, n, m;
  int width, value_width;
  int64_t step, jobs;
  const Job* job;
  float scale, softcap;  // 0: no cap
  bool adds;             // out and lse hold other keys' attention, which this one joins

  int groups() const { return (int)(heads / kv_heads); }
  // What scores are multiplied by before they are capped, or go into 2^x.
  float factor() const { return softcap > 0 ? scale / softcap : scale * LOG2E; }
};

// A tile's key blocks: calls `work(from, count, words)`; words is null where every row sees all.
template <class Work>
void each_block(const Job& job, int64_t tile, uint64_t* words, Work work) {
  int64_t first = tile * job.tile, rows = std::min(job.tile, job.n - first);
  int32_t whole = job.all_ptr[tile];
  for (int32_t range = job.some_ptr[tile]; range < job.some_ptr[tile + 1]; range++) {
    int64_t stop = job.some[2 * range + 1];
    for (int64_t from = job.some[2 * range]; from < stop;) {
      while (whole < job.all_ptr[tile + 1] && job.all[2 * whole + 1] <= from) whole++;
      int64_t end = std::min(stop, from + BLOCK);
      bool full = false;
      if (whole < job.all_ptr[tile + 1]) {
        int64_t start = job.all[2 * whole], last = job.all[2 * whole + 1];
        if (start <= from) {
          // Whole blocks run unmasked up to the last that fits.
          full = end <= last;
        } else if (start < end && start - from >= BLOCK / 4) {
          end = start;  // so that what follows needs no mask
        }
      }
      if (full) {
        work(from, (int)(end - from), (const uint64_t*)nullptr);
      } else {
        uint64_t keep = bits_between(0, end - from), any = 0;
        for (int64_t r = 0; r < rows; r++) any |= words[r] = mask_word(job, first + r, from) & keep;
        if (any) work(from, (int)(end - from), (const uint64_t*)words);
      }
      from = end;
    }
  }
}

// K or V of a block, one row a channel: `to[d * 64 + j]`, zeros past the last key.
void transpose(const View& x, float* to, int64_t b, int64_t h, int64_t first, int64_t step, int count,
               int width, float* line) {
  for (int j = 0; j < count; j++) {
    const float* row;
    if (x.kind == F32) row = (const float*)x.line(b, h, first + step * j);
    else x.read(line, b, h, first + step * j, width), row = line;
    for (int d = 0; d < width; d++) to[d * BLOCK + j] = row[d];
  }
  if (count < BLOCK)
    for (int d = 0; d < width; d++)
      for (int j = count; j < BLOCK; j++) to[d * BLOCK + j] = 0;
}

// Rows of a block as fp32: in place where they can be, else in `to`. Returns the row's stride.
int64_t rows_of(const View& x, float* to, const float** at, int64_t b, int64_t h, int64_t first,
                int64_t step, int count, int width) {
  if (x.kind == F32 && width % WIDE == 0) {
    *at = (const float*)x.line(b, h, first);
    return x.row * step;
  }
  int64_t wide = padded(width);
  for (int j = 0; j < count; j++) {
    x.read(to + j * wide, b, h, first + step * j, width);
    for (int64_t d = width; d < wide; d++) to[j * wide + d] = 0;
  }
  *at = to;
  return wide;
}

// One thread's memory for forward tiles.
struct Forward {
  const Problem& p;
  int groups, values;
  Buffer q, out, kt, v, s, line;
  std::vector<Softmax> soft;
  std::vector<uint64_t> words;

  Forward(const Problem& problem, int tile)
      : p(problem), groups(p.groups()), values(padded(p.value_width)), q((size_t)groups * tile * p.width),
        out((size_t)groups * tile * values), kt((size_t)p.width * BLOCK), v((size_t)BLOCK * values),
        s(STRIP * BLOCK), line(p.width), soft((size_t)groups * tile), words(tile) {}

  void tile(const Job& job, int64_t b, int64_t kv, int64_t at) {
    int64_t first = at * job.tile;
    int rows = (int)std::min(job.tile, job.n - first);
    std::memset(out.at, 0, sizeof(float) * groups * rows * values);
    for (int g = 0; g < groups; g++)
      for (int r = 0; r < rows; r++) {
        soft[g * rows + r] = Softmax();
        p.q.read(q.at + (g * rows + r) * p.width, b, kv * groups + g,
                 job.first_query + p.step * (first + r), p.width, p.factor());
      }
    each_block(job, at, words.data(), [&](int64_t from, int count, const uint64_t* mask) {
      int64_t key = job.first_key + p.step * from;
      transpose(p.k, kt.at, b, kv, key, p.step, count, p.width, line.at);
      const float* value;
      int64_t stride = rows_of(p.v, v.at, &value, b, kv, key, p.step, count, p.value_width);
      uint64_t whole[STRIP];
      for (int r = 0; r < STRIP; r++) whole[r] = bits_between(0, count);
      for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r += STRIP) {
          int some = std::min(STRIP, rows - r);
          const uint64_t* seen = mask ? mask + r : whole;
          uint64_t any = 0;
          for (int x = 0; x < some; x++) any |= seen[x];
          if (any) strip(g * rows + r, some, seen, value, stride, count);
        }
    });
    for (int g = 0; g < groups; g++)
      for (int r = 0; r < rows; r++) {
        const Softmax& x = soft[g * rows + r];
        int64_t head = kv * groups + g, row = job.first_query + p.step * (first + r);
        float *o = out.at + (g * rows + r) * values, *lse = p.lse + (b * p.heads + head) * p.n + row;
        float share = x.total == 0 ? 0 : 1 / x.total;
        if (p.adds) {
          share = join(o, share, x.lse(), (const float*)p.out.line(b, head, row), lse);
        } else {
          *lse = x.lse();
        }
        p.out.write(o, b, head, row, p.value_width, share);
      }
  }

  // Joins a row with `before`, of other keys; both by their log-sum-exps. Returns the row's factor.
  float join(float* o, float share, float mine, const float* before, float* lse) {
    float top = std::max(*lse, mine);
    if (top == NONE) return 0;
    float theirs = std::exp2((*lse - top) * LOG2E), ours = std::exp2((mine - top) * LOG2E);
    float sum = theirs + ours;
    *lse = top + std::log2(sum) * LN2;
    for (int d = 0; d < p.value_width; d++) o[d] = o[d] * (share * ours) + before[d] * theirs;
    return 1 / sum;
  }

  void strip(int64_t at, int some, const uint64_t* seen, const float* value, int64_t stride, int count) {
    uint64_t any = 0;
    for (int x = 0; x < some; x++) any |= seen[x];
    // Keys at either end that no row of the strip sees are left out, by whole vectors.
    int low = __builtin_ctzll(any) / LANES, high = (63 - __builtin_clzll(any)) / LANES + 1;
    scores(q.at + at * p.width, p.width, kt.at, s.at, some, p.width, low, high);
    finish(s.at, seen, some, p.softcap, low, high);
    float keep[STRIP];
    take(&soft[at], s.at, some, keep, low, high);
    for (int x = 0; x < some; x++) {
      if (keep[x] == 1.0f) continue;
      float* o = out.at + (at + x) * values;
      for (int d = 0; d < values; d += LANES) store(o + d, load(o + d) * keep[x]);
    }
    int first = low * LANES, depth = std::min(count, high * LANES) - first;
    products<true>(s.at + first, BLOCK, 1, value + first * stride, stride, out.at + at * values, values, some,
                   values, depth);
  }
};

// P of some rows against one block, from the saved log-sum-exp in base 2: `w` holds rows of 64. With
// a softcap, `slope` gets the derivative of the cap.
void weights(const Problem& p, const float* q, int q_row, const float* kt, const float* lse2,
             const uint64_t* mask, int rows, int count, float* w, float* slope) {
  products<false>(q, q_row, 1, kt, BLOCK, w, BLOCK, rows, BLOCK, p.width);
  if (p.softcap > 0) finish(w, nullptr, rows, p.softcap);
  if (slope)
    for (int at = 0; at < rows * BLOCK; at += LANES) {
      vf t = load(w + at) * (1 / (p.softcap * LOG2E));
      store(slope + at, 1.0f - t * t);
    }
  for (int r = 0; r < rows; r++) {
    uint64_t word = (mask ? mask[r] : ~0ull) & bits_between(0, count);
    float* row = w + r * BLOCK;
    finish(row, &word, 1, 0);
    for (int v = 0; v < BLOCK; v += LANES) store(row + v, exp2v(load(row + v) - lse2[r]));
  }
}

// One thread's memory for backward tiles, and for the attention that keys receive.
struct Backward {
  const Problem& p;
  int heads, width, values;
  Buffer q, kt, vt, k, w, dw, slope, grad_out, grad_q, line;
  std::vector<uint64_t> words;
  std::vector<float> lse2, delta;

  Backward(const Problem& problem, int tile, int heads_at_once, bool gradients)
      : p(problem), heads(heads_at_once), width(padded(p.width)), values(padded(p.value_width)),
        q((size_t)heads * tile * width), kt((size_t)p.width * BLOCK),
        vt(gradients ? (size_t)p.value_width * BLOCK : 0), k(gradients ? (size_t)BLOCK * width : 0),
        w((size_t)tile * BLOCK), dw(gradients ? (size_t)tile * BLOCK : 0),
        slope(p.softcap > 0 ? (size_t)tile * BLOCK : 0),
        grad_out(gradients ? (size_t)heads * tile * values : 0),
        grad_q(gradients ? (size_t)heads * tile * width : 0), line((size_t)std::max(width, values)),
        words(tile), lse2(heads * tile), delta(heads * tile) {}

  void read(const Job& job, int64_t b, int64_t head, int64_t first, int rows, bool gradients) {
    for (int h = 0; h < heads; h++)
      for (int r = 0; r < rows; r++) {
        int64_t row = job.first_query + p.step * (first + r);
        int64_t flat = (b * p.heads + head + h) * p.n + row;
        int at = h * rows + r;
        float* x = q.at + (int64_t)at * width;
        std::memset(x, 0, sizeof(float) * width);
        p.q.read(x, b, head + h, row, p.width, p.factor());
        // A row that saw nothing gets no weights, whatever its scores.
        lse2[at] = p.lse[flat] == NONE ? INFINITY : p.lse[flat] * LOG2E;
        if (!gradients) continue;
        float* y = grad_out.at + (int64_t)at * values;
        std::memset(y, 0, sizeof(float) * values);
        p.grad_out.read(y, b, head + h, row, p.value_width);
        p.out.read(line.at, b, head + h, row, p.value_width);
        float dot = p.grad_lse ? -p.grad_lse[flat] : 0;
        for (int d = 0; d < p.value_width; d++) dot += line.at[d] * y[d];
        delta[at] = dot;
      }
  }

  // `into_k` and `into_v` have a row for each key, of padded widths.
  void tile(const Job& job, int64_t b, int64_t head, int64_t kv, int64_t at, float* into_k, float* into_v) {
    int64_t first = at * job.tile;
    int rows = (int)std::min(job.tile, job.n - first);
    read(job, b, head, first, rows, true);
    std::memset(grad_q.at, 0, sizeof(float) * heads * rows * width);
    each_block(job, at, words.data(), [&](int64_t from, int count, const uint64_t* mask) {
      int64_t key = job.first_key + p.step * from;
      transpose(p.k, kt.at, b, kv, key, p.step, count, p.width, line.at);
      transpose(p.v, vt.at, b, kv, key, p.step, count, p.value_width, line.at);
      const float* lines;
      int64_t stride = rows_of(p.k, k.at, &lines, b, kv, key, p.step, count, p.width);
      int begin = 0, end = rows;
      if (mask) {  // rows at either end that see nothing of the block
        while (!mask[begin]) begin++;
        while (!mask[end - 1]) end--;
      }
      for (int h = 0; h < heads; h++)
        block(h * rows + begin, end - begin, mask ? mask + begin : nullptr, count, lines, stride,
              into_k + key * width, into_v + key * values);
    });
    for (int h = 0; h < heads; h++)
      for (int r = 0; r < rows; r++) {
        int64_t row = job.first_query + p.step * (first + r);
        float* to = p.grad_q + ((b * p.heads + head + h) * p.n + row) * p.width;
        const float* from = grad_q.at + (int64_t)(h * rows + r) * width;
        for (int d = 0; d < p.width; d++) to[d] += from[d] * p.scale;
      }
  }

  void block(int at, int some, const uint64_t* mask, int count, const float* lines, int64_t stride,
             float* into_k, float* into_v) {
    const float *x = q.at + (int64_t)at * width, *y = grad_out.at + (int64_t)at * values;
    weights(p, x, width, kt.at, &lse2[at], mask, some, count, w.at, p.softcap > 0 ? slope.at : nullptr);
    products<false>(y, values, 1, vt.at, BLOCK, dw.at, BLOCK, some, BLOCK, p.value_width);
    for (int r = 0; r < some; r++)
      for (int i = r * BLOCK; i < (r + 1) * BLOCK; i += LANES) {
        vf d = load(w.at + i) * (load(dw.at + i) - delta[at + r]);
        store(dw.at + i, p.softcap > 0 ? d * load(slope.at + i) : d);
      }
    float* to = grad_q.at + (int64_t)at * width;
    products<true>(dw.at, BLOCK, 1, lines, stride, to, width, some, width, count);
    products<true>(w.at, 1, BLOCK, y, values, into_v, p.step * values, count, values, some);
    products<true>(dw.at, 1, BLOCK, x, width, into_k, p.step * width, count, width, some);
  }

  void received(const Job& job, int64_t b, int64_t kv, int64_t at, float* total) {
    int64_t first = at * job.tile;
    int rows = (int)std::min(job.tile, job.n - first);
    read(job, b, kv * heads, first, rows, false);
    each_block(job, at, words.data(), [&](int64_t from, int count, const uint64_t* mask) {
      int64_t key = job.first_key + p.step * from;
      transpose(p.k, kt.at, b, kv, key, p.step, count, p.width, line.at);
      for (int h = 0; h < heads; h++) {
        weights(p, q.at + (int64_t)h * rows * width, width, kt.at, &lse2[h * rows], mask, rows, count, w.at,
                nullptr);
        for (int r = 0; r < rows; r++)
          for (int j = 0; j < count; j++) total[key + p.step * j] += w.at[r * BLOCK + j];
      }
    });
  }
};

int64_t largest_tile(const Problem& p) {
  int64_t most = 1;
  for (int64_t j = 0; j < p.jobs; j++) most = std::max(most, p.job[j].tile);
  return most;
}

inline int64_t tiles(const Job& job) { return (job.n + job.tile - 1) / job.tile; }

// The numbers of a call, in the order of `native.py`.
Problem problem(const int64_t* a, double scale, double softcap) {
  auto view = [&](int at, int64_t kind) {
    return View{(void*)a[at], a[at + 1], a[at + 2], a[at + 3], (Kind)kind};
  };
  Problem p{};
  p.batch = a[0], p.heads = a[1], p.kv_heads = a[2], p.n = a[3], p.m = a[4];
  p.width = (int)a[5], p.value_width = (int)a[6];
  p.step = a[9], p.jobs = a[10], p.job = (const Job*)a[11];
  p.q = view(12, a[7]), p.k = view(16, a[7]), p.v = view(20, a[7]);
  p.out = view(24, a[8]), p.grad_out = view(28, a[7]);
  p.lse = (float*)a[32], p.grad_lse = (float*)a[33];
  p.grad_q = (float*)a[34], p.grad_k = (float*)a[35], p.grad_v = (float*)a[36], p.total = (float*)a[37];
  p.adds = a[38];
  p.scale = (float)scale, p.softcap = (float)softcap;
  return p;
}

}  // namespace

extern "C" {

void attnspan_forward(const int64_t* numbers, double scale, double softcap) {
  Problem p = problem(numbers, scale, softcap);
  std::vector<int64_t> ends;
  int64_t all = 0;
  for (int64_t j = 0; j < p.jobs; j++) ends.push_back(all += tiles(p.job[j]));
#pragma omp parallel
  {
    Forward thread(p, (int)largest_tile(p));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.batch * p.kv_heads * all; task++) {
      int64_t pair = task / all, at = task % all;
      int64_t j = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
      thread.tile(p.job[j], pair / p.kv_heads, pair % p.kv_heads, at - (j ? ends[j - 1] : 0));
    }
  }
}

// A task is a KV head, or a query head where those are too few: what a task adds up, it adds up by
// itself, in the order of the tiles, so results don't depend on who ran first.
void attnspan_backward(const int64_t* numbers, double scale, double softcap) {
  Problem p = problem(numbers, scale, softcap);
  int threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  int64_t parts = p.batch * p.kv_heads < threads ? p.groups() : 1, heads = p.groups() / parts;
  int64_t width = padded(p.width), values = padded(p.value_width), tasks = p.batch * p.kv_heads * parts;
  std::vector<Buffer> keys;
  for (int64_t t = 0; t < tasks; t++) keys.emplace_back((size_t)(p.m * (width + values)));
#pragma omp parallel
  {
    Backward thread(p, (int)largest_tile(p), (int)heads, true);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      int64_t pair = task / parts, b = pair / p.kv_heads, kv = pair % p.kv_heads;
      float* into = keys[task].at;
      for (int64_t j = 0; j < p.jobs; j++)
        for (int64_t at = 0; at < tiles(p.job[j]); at++)
          thread.tile(p.job[j], b, kv * p.groups() + task % parts * heads, kv, at, into,
                      into + p.m * width);
    }
    float factor = p.softcap > 0 ? p.softcap : LN2;  // scale / p.factor(), for a scale of 0 too
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.batch * p.kv_heads * p.m; row++) {
      int64_t pair = row / p.m, key = row % p.m;
      for (int64_t part = 0; part < parts; part++) {
        const float* from = keys[pair * parts + part].at;
        for (int d = 0; d < p.width; d++) p.grad_k[row * p.width + d] += from[key * width + d] * factor;
        from += p.m * width;
        for (int d = 0; d < p.value_width; d++) p.grad_v[row * p.value_width + d] += from[key * values + d];
      }
    }
  }
}

void attnspan_received(const int64_t* numbers, double scale, double softcap) {
  Problem p = problem(numbers, scale, softcap);
#pragma omp parallel
  {
    Backward thread(p, (int)largest_tile(p), p.groups(), false);
#pragma omp for schedule(dynamic)
    for (int64_t pair = 0; pair < p.batch * p.kv_heads; pair++)
      for (int64_t j = 0; j < p.jobs; j++)
        for (int64_t at = 0; at < tiles(p.job[j]); at++)
          thread.received(p.job[j], pair / p.kv_heads, pair % p.kv_heads, at, p.total + pair * p.m);
  }
}

const char* attnspan_vectors() {
#if defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX__)
  return "AVX";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "no vectors";
#endif
}
}
