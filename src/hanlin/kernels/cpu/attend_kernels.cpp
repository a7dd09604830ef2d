// Attention over the key/value pool, compiled once a variant: see hl_attend for what is computed.
#include "attend_codes.h"
#include "attend_floats.h"

namespace hl::HL_VARIANT {
namespace {

// A record, see partial_floats: [0, padded) the sum of weights times values; then the shift of the weights, and their
// sum.
void fold(float* record, const float* more, int64_t padded) {
  const float before = record[padded], here = more[padded], shift = before > here ? before : here;
  float keep[lanes], take[lanes];
  store(keep, power(set1(before - shift)));
  store(take, power(set1(here - shift)));
  for (int64_t i = 0; i < padded; i += lanes)
    store(record + i, fma(load(more + i), set1(take[0]), mul(load(record + i), set1(keep[0]))));
  record[padded] = shift;
  record[padded + 1] = record[padded + 1] * keep[0] + more[padded + 1] * take[0];
}

// Which query and head a row is, how many keys it sees, and where its output goes.
struct Row {
  Row(const Attention& what, int32_t sequence, int32_t kv_head, int64_t row) {
    const hl_step& step = *what.step;
    const int64_t share = what.heads / what.kv->heads, query = row / share;
    token = step.query_start[sequence] + query;
    head = kv_head * share + row % share;
    const int64_t queries = step.query_start[sequence + 1] - step.query_start[sequence];
    keys = visible(step, sequence, step.context[sequence] - queries + query);
  }
  int64_t token, head, keys;
};

void finish(const Attention& what, const Row& row, const float* record) {
  const int32_t n = what.kv->head_size;
  const F total = set1(record[padded_head(n) + 1]);
  float* to = what.out + row.token * what.ldo + row.head * n;
  for (int32_t i = 0; i < n; i += lanes) store(to + i, div(load(record + i), total), n - i < lanes ? n - i : lanes);
}

// ---- a task --------------------------------------------------------------------------------------------------------

// bfloat16 as floats, where the CPU does not multiply it: keys and values of HL_SLOTS slots in the layout of HL_KV_F32.
void widen_slots(const uint8_t* from, int64_t padded, uint8_t* to) {
  const int64_t part = padded * HL_SLOTS * 4;
  const auto each = [&](int64_t at, int64_t to_at, int64_t apart) {
    const I pairs = load_bits(from + at);
    store(reinterpret_cast<float*>(to + to_at), from_bits(shl<16>(pairs)));
    store(reinterpret_cast<float*>(to + to_at + apart),
          from_bits(andi(pairs, set1i(static_cast<int32_t>(0xFFFF0000u)))));
  };
  for (int64_t j = 0; j < padded / 2; j++) each(64 * j, 128 * j, 64);
  const int64_t row = padded * 4;
  for (int64_t pair = 0; pair < HL_SLOTS / 2; pair++)
    for (int64_t at = 0; at < row; at += 64) each(part / 2 + pair * row + at, part + 2 * pair * row + at, row);
}

// What a task keeps beside it. Each part starts on a multiple of 64 bytes.
template <class Engine>
struct Desk {
  Desk(const hl_kv& kv, bool widens, void* memory) {
    const int64_t padded = padded_head(kv.head_size);
    uint8_t* at = static_cast<uint8_t*>(memory);
    const auto take = [&](int64_t bytes) {
      uint8_t* here = at;
      at += bytes;
      return here;
    };
    query_bytes = Engine::query_bytes(padded);
    wide_bytes = widens ? padded * HL_SLOTS * 4 * 2 : 0;
    queries = take(query_bytes * attend_rows);
    scores = reinterpret_cast<float*>(take(int64_t{4} * HL_SPAN * group_rows));
    weights = take(Engine::weight_bytes * group_rows);
    parts = reinterpret_cast<float*>(take(padded * 4 * group_rows));
    record = reinterpret_cast<float*>(take(partial_floats(kv.head_size) * 4));
    records = reinterpret_cast<float*>(take(partial_floats(kv.head_size) * 4 * attend_rows));
    wide_slots = take(wide_bytes * span_groups);
    bytes = at - static_cast<uint8_t*>(memory);
  }

  uint8_t *queries, *weights, *wide_slots;
  float *scores, *parts, *record, *records;
  int64_t query_bytes, wide_bytes, bytes;
};

template <class Engine>
void attend_with(const Attention& what, const AttendTask& task, bool widens, void* scratch) {
  const hl_kv& kv = *what.kv;
  const Desk<Engine> desk(kv, widens, scratch);
  const int64_t padded = padded_head(kv.head_size), record_floats = partial_floats(kv.head_size);
  const int64_t keys_bytes = kv_keys_bytes(kv), values_bytes = kv_values_bytes(kv), slots_bytes = kv_slots_bytes(kv);
  const int rows = task.row1 - task.row0;
  const int32_t* blocks = what.step->block_table + static_cast<int64_t>(task.sequence) * what.step->max_blocks;
  const auto slots_at = [&](int64_t key) {
    return kv_slots(kv, blocks[key / kv.block_size], task.kv_head, key % kv.block_size);
  };

  const float factor = what.scale * 1.44269504088896341f;  // of powers of two
  int64_t keys[attend_rows], most = 0;
  for (int r = 0; r < rows; r++) {
    const Row row(what, task.sequence, task.kv_head, task.row0 + r);
    Engine::put_query(what.q + row.token * what.ldq + row.head * kv.head_size, kv.head_size,
                      desk.queries + r * desk.query_bytes, desk.query_bytes);
    keys[r] = row.keys;
    most = most > keys[r] ? most : keys[r];
  }
  const int64_t end = int64_t{task.span1} * HL_SPAN < most ? int64_t{task.span1} * HL_SPAN : most;

  for (int32_t span = task.span0; span < task.span1; span++) {
    const int64_t first = int64_t{span} * HL_SPAN, last = first + HL_SPAN < end ? first + HL_SPAN : end;
    Groups groups;
    for (int64_t at = first; at < last; at += HL_SLOTS) {
      const int64_t g = (at - first) / HL_SLOTS;
      const uint8_t* slots = slots_at(at);
      if (at + HL_SPAN < end) ask_for(slots_at(at + HL_SPAN), slots_bytes < 256 ? slots_bytes : 256);
      groups.keys[g] = slots;
      groups.values[g] = slots + keys_bytes;
      groups.params[g] = reinterpret_cast<const uint16_t*>(slots + keys_bytes + values_bytes);
      if (!widens) continue;
      uint8_t* to = desk.wide_slots + g * desk.wide_bytes;
      widen_slots(slots, padded, to);
      groups.keys[g] = to;
      groups.values[g] = to + desk.wide_bytes / 2;
    }
    for (int r0 = 0; r0 < rows; r0 += group_rows) {
      groups.fresh = r0 == 0;
      const int height = rows - r0 < group_rows ? rows - r0 : group_rows;
      int counts[group_rows], longest = 0;
      for (int r = 0; r < height; r++) {
        const int64_t left = keys[r0 + r] - first;
        counts[r] = static_cast<int>(left < 0 ? 0 : left < HL_SPAN ? left : HL_SPAN);
        longest = longest > counts[r] ? longest : counts[r];
      }
      if (longest == 0) continue;
      const int n_groups = (longest + HL_SLOTS - 1) / HL_SLOTS;
      Engine::score(height, groups, n_groups, kv.head_size, desk.queries + r0 * desk.query_bytes, desk.query_bytes,
                    desk.scores);
      float shifts[group_rows], totals[group_rows];
      for (int r = 0; r < height; r++) {
        float* scores = desk.scores + r * HL_SPAN;
        shifts[r] = factor * highest(scores, counts[r]);
        totals[r] = Engine::weigh(scores, counts[r], n_groups * HL_SLOTS, {factor, shifts[r]}, groups,
                                  desk.weights + r * Engine::weight_bytes);
      }
      Engine::value(height, groups, longest, padded, desk.weights, desk.parts);
      for (int r = 0; r < height; r++) {
        if (counts[r] == 0) continue;
        float* to = desk.records + (r0 + r) * record_floats;
        if (task.partial >= 0)
          to = what.partials + task.partial + ((span - task.span0) * int64_t{rows} + r0 + r) * record_floats;
        float* record = span == 0 || task.partial >= 0 ? to : desk.record;
        memcpy(record, desk.parts + r * padded, static_cast<size_t>(padded) * 4);
        record[padded] = shifts[r];
        record[padded + 1] = totals[r];
        if (record != to) fold(to, record, padded);
      }
    }
  }
  if (task.partial >= 0) return;
  for (int r = 0; r < rows; r++)
    finish(what, Row(what, task.sequence, task.kv_head, task.row0 + r), desk.records + r * record_floats);
}

// Where there is AMX, a vector's products of bfloat16 take four times as long as those of floats (measured on Sapphire
// Rapids: 0.45 a cycle against 1.8), so there they are widened as well.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
using Bf16Engine = FloatEngine<Pairs>;
constexpr bool widens_bf16 = false;
#else
using Bf16Engine = FloatEngine<Floats>;
constexpr bool widens_bf16 = true;
#endif

}  // namespace

int64_t attend_scratch(const hl_kv& kv) {
  switch (kv.kind) {
    case HL_KV_F32:
      return Desk<FloatEngine<Floats>>(kv, false, nullptr).bytes;
    case HL_KV_BF16:
      return Desk<Bf16Engine>(kv, widens_bf16, nullptr).bytes;
    case HL_KV_INT8:
      return Desk<CodeEngine<HL_KV_INT8>>(kv, false, nullptr).bytes;
    default:
      return Desk<CodeEngine<HL_KV_INT4>>(kv, false, nullptr).bytes;
  }
}

void attend(const Attention& what, const AttendTask& task, void* scratch) {
  switch (what.kv->kind) {
    case HL_KV_F32:
      return attend_with<FloatEngine<Floats>>(what, task, false, scratch);
    case HL_KV_BF16:
      if (widens_bf16 && task.row1 - task.row0 <= group_rows) return attend_with<WidenedPairs>(what, task, false, scratch);
      return attend_with<Bf16Engine>(what, task, widens_bf16, scratch);
    case HL_KV_INT8:
      return attend_with<CodeEngine<HL_KV_INT8>>(what, task, false, scratch);
    default:
      return attend_with<CodeEngine<HL_KV_INT4>>(what, task, false, scratch);
  }
}

void merge(const Attention& what, const AttendTask& spans, int32_t row) {
  const int64_t padded = padded_head(what.kv->head_size), record_floats = partial_floats(what.kv->head_size);
  const int64_t rows = spans.row1 - spans.row0;
  const Row which(what, spans.sequence, spans.kv_head, row);
  float* first = what.partials + spans.partial + (row - spans.row0) * record_floats;
  for (int64_t span = 1; span < spans.span1 && span * HL_SPAN < which.keys; span++)
    fold(first, first + span * rows * record_floats, padded);
  finish(what, which, first);
}

}  // namespace hl::HL_VARIANT
