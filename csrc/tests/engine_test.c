/* Drives the engine without Python or torch, so that sanitizers see it from the first byte.
 *
 * `make sanitize` builds and runs it three times: with AddressSanitizer and
 * UndefinedBehaviorSanitizer, with ThreadSanitizer, and as it is shipped, with guard pages around
 * every tensor. What kernels compute is tested in Python; here it is where they read and write,
 * and some values that are known in closed form. Arguments are names of tests; none runs all.
 */
#include "../engine.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define NUMBERS 32 /* more than any kernel has */
#define LAST_SIZE 1025
#define TIME_LIMIT 300 /* seconds; a deadlock would otherwise be for ever */

static const struct kernel_table *const table = &torchopt_kernels_generic;
static const char *const every_set[] = {"generic", "avx2", "avx512"};
#define SETS 3

/* As shipped: a tensor ends, or begins, at a page that cannot be touched. Otherwise it has exactly
 * its size, and AddressSanitizer sees the byte before and the byte behind. */
#if !defined(AS_SHIPPED)
#define AS_SHIPPED 0
#endif

#define CHECK(condition) check(condition, #condition, __LINE__)

static void check(int condition, const char *text, int line) {
  if (condition) return;
  fprintf(stderr, "engine_test.c:%d: %s\n", line, text);
  abort();
}

/* Memory ------------------------------------------------------------------------------------- */

struct room {
  char *tensor, *pages;
};

#if AS_SHIPPED
#define PAGES 4
#define ROOMS 64
static char *unused[ROOMS]; /* rooms to be taken again: mapping them is slow */
static int unused_count;

static struct room new_room(size_t bytes, int at_end) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = PAGES * page;
  struct room room;
  CHECK(bytes <= inner);
  if (unused_count > 0) {
    room.pages = unused[--unused_count];
  } else {
    room.pages = mmap(NULL, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(room.pages != MAP_FAILED);
    CHECK(mprotect(room.pages + page, inner, PROT_READ | PROT_WRITE) == 0);
  }
  room.tensor = room.pages + page + (at_end ? inner - bytes : 0);
  return room;
}

static void free_room(struct room *room) {
  CHECK(unused_count < ROOMS);
  unused[unused_count++] = room->pages;
}
#else
static struct room new_room(size_t bytes, int at_end) {
  struct room room = {malloc(bytes), NULL};
  (void)at_end;
  CHECK(room.tensor != NULL || bytes == 0);
  return room;
}

static void free_room(struct room *room) { free(room->tensor); }
#endif

static uint64_t random_state = 88172645463325252u;

static uint64_t random_bits(void) { /* Marsaglia's xorshift */
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

/* Any bits at all: nan, infinite and subnormal numbers among them. */
static void fill(char *bytes, size_t size) {
  for (size_t i = 0; i < size; i += 8) {
    uint64_t bits = random_bits();
    memcpy(bytes + i, &bits, size - i < 8 ? size - i : 8);
  }
}

static size_t entry_size(int64_t dtype, int64_t narrow, int k) {
  if (dtype == FLOAT64) return 8;
  return dtype != FLOAT32 && (narrow >> k & 1) ? 2 : 4;
}

static int widest(int inputs) {
  int most = 0;
  for (int64_t k = 0; k < table->count; ++k) {
    int operands = inputs ? table->kernels[k].inputs : table->kernels[k].outputs;
    if (operands > most) most = operands;
  }
  return most;
}

/* Every kernel, dtype, size and instruction set ------------------------------------------------ */

enum variant { PLAIN, IN_PLACE, ABSENT, MISALIGNED, VARIANTS };

static void run_every_kernel(int64_t size, int64_t dtype, enum variant variant) {
  struct room in_rooms[MAX_STREAMS], out_rooms[MAX_STREAMS];
  int64_t in[MAX_STREAMS], out[MAX_STREAMS];
  double numbers[NUMBERS];
  const int inputs = widest(1), outputs = widest(0);
  int64_t narrow = (int64_t)(random_bits() & 0xffffffu);
  size_t shift = variant == MISALIGNED;
  for (int k = 0; k < NUMBERS; ++k) numbers[k] = (double)(random_bits() % 1000) / 500 - 1;
  for (int k = 0; k < inputs; ++k) {
    size_t bytes = (size_t)size * entry_size(dtype, narrow, k) + shift;
    in_rooms[k] = new_room(bytes, k & 1);
    fill(in_rooms[k].tensor, bytes);
    int absent = variant == ABSENT && random_bits() & 1;
    in[k] = absent ? 0 : (int64_t)(intptr_t)(in_rooms[k].tensor + shift);
  }
  for (int k = 0; k < outputs; ++k) {
    out_rooms[k] = new_room((size_t)size * entry_size(dtype, narrow, k) + shift, ~k & 1);
    int absent = variant == ABSENT && random_bits() & 1;
    out[k] = absent ? 0 : (int64_t)(intptr_t)(out_rooms[k].tensor + shift);
    if (variant == IN_PLACE && k < inputs) out[k] = in[k];
  }
  for (int64_t k = 0; k < table->count; ++k) {
    if ((k + size) % VARIANTS != variant) continue;
    struct call call = {k, dtype, narrow, narrow, 1, 0, 1, &size, NULL, in, out, numbers, 0, NULL, 0, NULL};
    CHECK(torchopt_run(&call) == 0 && call.done == 1);
  }
  for (int k = 0; k < inputs; ++k) free_room(&in_rooms[k]);
  for (int k = 0; k < outputs; ++k) free_room(&out_rooms[k]);
}

/* Sanitizers see every size with one instruction set in turn: without optimisation all of them are
 * the same loop. As shipped each has its own, and runs every size. */
static void test_kernels(void) {
  int64_t here = 0;
  for (int s = 0; s < SETS; ++s) here += torchopt_select(every_set[s]) == 0;
  for (int64_t turn = 0, s = 0; s < SETS; ++s) {
    if (torchopt_select(every_set[s]) != 0) continue;
    CHECK(strcmp(torchopt_instruction_set(), every_set[s]) == 0);
    CHECK(torchopt_count() == table->count);
    for (int64_t size = AS_SHIPPED ? 0 : turn; size <= LAST_SIZE; size += AS_SHIPPED ? 1 : here)
      for (int64_t dtype = FLOAT64; dtype <= FLOAT16; ++dtype)
        for (enum variant variant = PLAIN; variant < VARIANTS; ++variant)
          run_every_kernel(size, dtype, variant);
    ++turn;
  }
}

/* Programs ------------------------------------------------------------------------------------- */

#define IN 3
#define OUT 2
#define STEPS 9

static int32_t any(int64_t first, int64_t count) {
  return (int32_t)(first + (int64_t)(random_bits() % (uint64_t)count));
}

/* A program that makes sense: its first operation is given, what else it does is by chance. */
static struct program some_program(int64_t first, int32_t *code) {
  static const int64_t registers[] = {1, 3, 40, MAX_REGISTERS};
  struct program program = {IN, OUT, 4, registers[random_bits() % 4], STEPS, code};
  const int32_t *written = code + 1; /* what the first instruction writes */
  for (int k = 0; k < STEPS; ++k, code += INSTRUCTION) {
    int64_t operation = k == 0 ? first : any(0, table->operation_count);
    const char *kinds = table->operations[operation].arguments;
    code[0] = (int32_t)operation;
    code[1] = any(IN, OUT);
    if (random_bits() & 1) code[1] = any(IN + OUT + program.numbers, program.registers);
    for (int n = 2; n < INSTRUCTION; ++n) {
      code[n] = *kinds == 0 ? 0 : *kinds == 'n' ? any(IN + OUT, program.numbers) : any(0, IN);
      if (*kinds == 'v' && k > 0 && random_bits() & 1) code[n] = *written;
      kinds += *kinds != 0;
    }
  }
  return program;
}

static void run_some_program(int64_t first, int64_t size, int64_t dtype, enum variant variant) {
  struct room in_rooms[IN], out_rooms[OUT];
  int64_t in[IN], out[OUT], narrow = (int64_t)(random_bits() & 0xffffffu);
  int32_t code[STEPS * INSTRUCTION];
  const double numbers[] = {0.5, -2, 0, 1e30};
  size_t shift = variant == MISALIGNED;
  struct program program = some_program(first, code);
  for (int k = 0; k < IN; ++k) {
    size_t bytes = (size_t)size * entry_size(dtype, narrow, k) + shift;
    in_rooms[k] = new_room(bytes, k & 1);
    fill(in_rooms[k].tensor, bytes);
    int absent = variant == ABSENT && random_bits() & 1;
    in[k] = absent ? 0 : (int64_t)(intptr_t)(in_rooms[k].tensor + shift);
  }
  for (int k = 0; k < OUT; ++k) {
    out_rooms[k] = new_room((size_t)size * entry_size(dtype, narrow, k) + shift, ~k & 1);
    int absent = variant == ABSENT && random_bits() & 1;
    out[k] = absent ? 0 : (int64_t)(intptr_t)(out_rooms[k].tensor + shift);
    if (variant == IN_PLACE) out[k] = in[k];
  }
  struct call call = {-1,   dtype, narrow, narrow,  1, 0,        1, &size,
                      NULL, in,    out,    numbers, 0, &program, 0, NULL};
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
  for (int k = 0; k < IN; ++k) free_room(&in_rooms[k]);
  for (int k = 0; k < OUT; ++k) free_room(&out_rooms[k]);
}

static void test_programs(void) {
  for (int64_t s = 0, first = 0; s < SETS; ++s) {
    if (torchopt_select(every_set[s]) != 0) continue;
    for (int64_t size = 0; size <= LAST_SIZE; size += AS_SHIPPED ? 1 : 1 + size / 24)
      for (int64_t dtype = FLOAT64; dtype <= FLOAT16; ++dtype)
        for (enum variant variant = PLAIN; variant < VARIANTS; ++variant)
          run_some_program(first++ % table->operation_count, size, dtype, variant);
    CHECK(first > table->operation_count);
  }
  CHECK(torchopt_operation(-1) == NULL && torchopt_operation(table->operation_count) == NULL);
  CHECK(strcmp(torchopt_operation(0), table->operations[0].name) == 0);
}

/* Programs by chance alone: those that are taken must stay where they belong. */
static void test_any_program(void) {
  int32_t code[STEPS * INSTRUCTION];
  double numbers[MAX_NUMBERS], from[16], to[16];
  int64_t size = 16, taken = 0, in[IN], out[OUT];
  for (int k = 0; k < MAX_NUMBERS; ++k) numbers[k] = k;
  for (int k = 0; k < 16; ++k) from[k] = k;
  for (int k = 0; k < IN; ++k) in[k] = (int64_t)(intptr_t)from;
  for (int k = 0; k < OUT; ++k) out[k] = (int64_t)(intptr_t)to;
  for (int round = 0; round < 30000; ++round) {
    struct program program = some_program(any(0, table->operation_count), code);
    for (int change = any(0, 3); change > 0; --change) {
      int32_t values[] = {-1, any(0, 12), INT32_MAX, INT32_MIN, any(0, MAX_REGISTERS + 10)};
      code[any(0, STEPS * INSTRUCTION)] = values[random_bits() % 5];
    }
    if (random_bits() % 8 == 0) program.registers = any(-2, MAX_REGISTERS + 4);
    if (random_bits() % 8 == 0) program.numbers = any(-2, MAX_NUMBERS + 4);
    struct call call = {-1,   FLOAT64, 0,   0,       1, 0,        1, &size,
                        NULL, in,      out, numbers, 0, &program, 0, NULL};
    taken += torchopt_run(&call) == 0;
    for (int k = 0; k < 16; ++k) CHECK(from[k] == k);
  }
  CHECK(taken > 1000 && taken < 29000);
}

/* Values in closed form ------------------------------------------------------------------------ */

/* A kernel that multiplies by the product of its numbers, as SGD's do: one operand in, one out. */
struct scaling {
  int64_t kernel;
  int numbers;
};

static void scale(const struct scaling *scaling, int64_t dtype, int64_t narrow_in,
                  int64_t narrow_out, const void *from, void *to, int64_t size, double number) {
  double numbers[NUMBERS];
  int64_t in = (int64_t)(intptr_t)from, out = (int64_t)(intptr_t)to;
  for (int k = 0; k < NUMBERS; ++k) numbers[k] = number;
  struct call call = {scaling->kernel, dtype, narrow_in, narrow_out, 1,       0, 1,
                      &size,           NULL,  &in,       &out,       numbers, 0, NULL, 0, NULL};
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
}

static struct scaling find_scaling(void) {
  const double from[] = {1.5, -7, 0};
  double once[3], twice[3];
  for (int64_t k = 0; k < table->count; ++k) {
    if (table->kernels[k].inputs != 1 || table->kernels[k].outputs != 1) continue;
    struct scaling found = {k, 0};
    scale(&found, FLOAT64, 0, 0, from, once, 3, 1);
    scale(&found, FLOAT64, 0, 0, from, twice, 3, 2);
    found.numbers = (int)log2(twice[0] / 1.5);
    int fits = memcmp(once, from, sizeof from) == 0 && found.numbers >= 1;
    for (int i = 0; i < 3; ++i) fits = fits && twice[i] == ldexp(from[i], found.numbers);
    if (fits) return found;
  }
  CHECK(!"the table has a kernel that scales");
  abort();
}

/* Half-precision formats: bits of the fraction, least exponent of a normal number. */
struct format {
  int64_t dtype;
  int fraction, least;
};
static const struct format formats[] = {{BFLOAT16, 7, -126}, {FLOAT16, 10, -14}};

static double decode(const struct format *format, unsigned half) {
  int fraction = half & ((1u << format->fraction) - 1);
  int exponent = (half & 0x7fffu) >> format->fraction;
  double sign = half & 0x8000u ? -1 : 1;
  if (exponent == 0x7fff >> format->fraction) return fraction ? (double)NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, format->least - format->fraction);
  fraction += 1 << format->fraction;
  return sign * ldexp(fraction, format->least - format->fraction + exponent - 1);
}

static double rounded(const struct format *format, double value) { /* ties to even */
  int exponent = value == 0 || !isfinite(value) ? 0 : ilogb(value);
  if (exponent < format->least) exponent = format->least;
  double unit = ldexp(1, exponent - format->fraction);
  double result = nearbyint(value / unit) * unit;
  return fabs(result) >= ldexp(1, 2 - format->least) ? copysign(INFINITY, value) : result;
}

static int same(double a, double b) {
  return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b));
}

#define ALL_HALVES 65536

static void test_half(void) {
  const struct scaling identity = find_scaling();
  uint16_t *halves = malloc(2 * ALL_HALVES), *narrow = malloc(2 * ALL_HALVES);
  float *wide = malloc(4 * ALL_HALVES);
  for (int h = 0; h < ALL_HALVES; ++h) halves[h] = (uint16_t)h;
  for (int f = 0; f < 2; ++f) {
    const struct format *format = &formats[f];
    scale(&identity, format->dtype, 1, 0, halves, wide, ALL_HALVES, 1);
    for (int h = 0; h < ALL_HALVES; ++h) CHECK(same(wide[h], decode(format, halves[h])));
    scale(&identity, format->dtype, 1, 1, halves, narrow, ALL_HALVES, 1);
    for (int h = 0; h < ALL_HALVES; ++h)
      CHECK(narrow[h] == halves[h] || (isnan(wide[h]) && isnan(decode(format, narrow[h]))));
    for (int round = 0; round < 32; ++round) {
      for (int i = 0; i < ALL_HALVES; ++i) { /* any float; every second one near a tie */
        uint32_t bits = (uint32_t)random_bits(), gap = 23u - (uint32_t)format->fraction;
        if (i & 1) bits = (bits >> gap << gap) + (1u << (gap - 1)) + (uint32_t)(i >> 1) % 3 - 1;
        if (format->dtype == FLOAT16 && i & 2) bits = (bits & 0x8fffffffu) | 0x30000000u;
        memcpy(wide + i, &bits, 4);
      }
      scale(&identity, format->dtype, 0, 1, wide, narrow, ALL_HALVES, 1);
      for (int i = 0; i < ALL_HALVES; ++i)
        CHECK(same(decode(format, narrow[i]), rounded(format, wide[i])));
    }
  }
  free(halves);
  free(narrow);
  free(wide);
}

static void test_rows(void) {
  const struct scaling scaling = find_scaling();
  const double values[] = {1, 2, 0.5};
  const int64_t sizes[] = {3, 0, 700, 1, 300}, rows[] = {2, 0, 1, 0, 2};
  double numbers[3 * NUMBERS];
  struct room from[5], to[5];
  int64_t in[5], out[5];
  for (int k = 0; k < 3 * NUMBERS; ++k) numbers[k] = values[k / NUMBERS];
  for (int t = 0; t < 5; ++t) {
    from[t] = new_room((size_t)sizes[t] * 8, 1);
    to[t] = new_room((size_t)sizes[t] * 8, 1);
    for (int64_t i = 0; i < sizes[t]; ++i) ((double *)from[t].tensor)[i] = (double)i + t;
    in[t] = (int64_t)(intptr_t)from[t].tensor;
    out[t] = (int64_t)(intptr_t)to[t].tensor;
  }
  struct call call = {scaling.kernel, FLOAT64, 0,  0,   5,       NUMBERS, 1,
                      sizes,          rows,    in, out, numbers, 0, NULL, 0, NULL};
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
  for (int t = 0; t < 5; ++t) {
    double factor = pow(values[rows[t]], scaling.numbers);
    for (int64_t i = 0; i < sizes[t]; ++i)
      CHECK(((double *)to[t].tensor)[i] == ((double)i + t) * factor);
    free_room(&from[t]);
    free_room(&to[t]);
  }
}

static void test_refused(void) {
  const struct scaling scaling = find_scaling();
  const double numbers[NUMBERS] = {0};
  double from[4] = {1, 2, 3, 4}, to[4] = {5, 6, 7, 8};
  const int64_t in[2] = {(int64_t)(intptr_t)from, (int64_t)(intptr_t)from};
  const int64_t out[2] = {(int64_t)(intptr_t)to, (int64_t)(intptr_t)to};
  const int64_t good[2] = {2, 2}, zero[2] = {0, 0};
  const int64_t negative[2] = {2, -1}, huge[2] = {INT64_MAX, INT64_MAX}, large[2] = {2, 1LL << 60};
  const int64_t before[2] = {0, -1}, behind[2] = {0, 2}, far[2] = {0, INT64_MAX};
  const struct call sound = {scaling.kernel, FLOAT64, 0,  0,   2,       NUMBERS, 1,
                             good,           zero,    in, out, numbers, 0, NULL, 0, NULL};
#define REFUSED(change)                                     \
  do {                                                      \
    struct call call = sound;                               \
    call.change;                                            \
    call.done = 1;                                          \
    CHECK(torchopt_run(&call) < 0 && call.done == 0);       \
    CHECK(to[0] == 5 && to[1] == 6 && to[2] == 7 && to[3] == 8); \
  } while (0)
  REFUSED(kernel = -1); /* no program */
  REFUSED(kernel = -2);
  REFUSED(kernel = table->count);
  REFUSED(kernel = INT64_MAX);
  REFUSED(dtype = -1);
  REFUSED(dtype = 4);
  REFUSED(count = -1);
  REFUSED(count = INT64_MAX);
  REFUSED(width = -1);
  REFUSED(width = INT64_MAX);
  REFUSED(sizes = NULL);
  REFUSED(in = NULL);
  REFUSED(out = NULL);
  REFUSED(sizes = negative);
  REFUSED(sizes = huge);
  REFUSED(sizes = large);
  REFUSED(rows = before);
  REFUSED(rows = behind);
  REFUSED(rows = far);
  REFUSED(summed = 1); /* nowhere to */
  REFUSED(summed = 2); /* no such output */
  REFUSED(summed = -1);
  struct call call = sound;
  call.count = 0;
  call.sizes = call.in = call.out = NULL;
  CHECK(torchopt_run(&call) == 0 && call.done == 1); /* nothing to do is no fault */
  CHECK(torchopt_find("no such kernel") == -1 && torchopt_select("no such set") == -1);
  CHECK(torchopt_find(table->kernels[7].name) == 7);
}

/* Threads -------------------------------------------------------------------------------------- */

#define TENSORS 40
#define ENTRIES 160000 /* of a tensor, about: enough work for several threads */

/* Scale many tensors of many sizes in place by so many threads, and look at every entry: one that
 * is visited twice, or not at all, has another value. */
static void scale_many(int64_t threads, int64_t dtype, float number) {
  const struct scaling scaling = find_scaling();
  float *all = calloc(2 * TENSORS * ENTRIES, sizeof(float)), *at = all;
  int64_t sizes[TENSORS], places[TENSORS];
  double numbers[NUMBERS];
  for (int k = 0; k < NUMBERS; ++k) numbers[k] = number;
  for (int t = 0; t < TENSORS; ++t) {
    sizes[t] = t % 7 == 3 ? 0 : t % 7 == 5 ? t : 2 * ENTRIES * (t % 5 + 1) / 6 - t;
    places[t] = (int64_t)(intptr_t)at;
    for (int64_t i = 0; i < sizes[t]; ++i) *at++ = (float)(i % 1000 + t);
  }
  struct call call = {scaling.kernel, dtype, 0,      0,      TENSORS, 0, threads,
                      sizes,          NULL,  places, places, numbers, 0, NULL, 0, NULL};
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
  float factor = powf(number, (float)scaling.numbers);
  at = all;
  for (int t = 0; t < TENSORS; ++t)
    for (int64_t i = 0; i < sizes[t]; ++i) CHECK(*at++ == (float)(i % 1000 + t) * factor);
  while (at < all + 2 * TENSORS * ENTRIES) CHECK(*at++ == 0);
  free(all);
}

/* The sums over such tensors: whole numbers, so that they are exact in any order. */
static void sum_many(int64_t threads) {
  const struct scaling scaling = find_scaling();
  float *all = calloc(2 * TENSORS * ENTRIES, sizeof(float)), *at = all;
  int64_t sizes[TENSORS], places[TENSORS], nowhere[TENSORS] = {0};
  double numbers[NUMBERS], sums[TENSORS], expected[TENSORS];
  for (int k = 0; k < NUMBERS; ++k) numbers[k] = 1;
  for (int t = 0; t < TENSORS; ++t) {
    sizes[t] = t % 7 == 3 ? 0 : t % 7 == 5 ? t : 2 * ENTRIES * (t % 5 + 1) / 6 - t;
    places[t] = (int64_t)(intptr_t)at;
    expected[t] = 0;
    for (int64_t i = 0; i < sizes[t]; ++i) expected[t] += *at++ = (float)(i % 1000 + t);
  }
  struct call call = {scaling.kernel, FLOAT32, 0,      0,       TENSORS, 0, threads, sizes,
                      NULL,           places,  nowhere, numbers, 0,       NULL, 1,       sums};
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
  for (int t = 0; t < TENSORS; ++t) CHECK(sums[t] == expected[t]);
  int64_t in_place[TENSORS]; /* what is summed may be written, too */
  for (int t = 0; t < TENSORS; ++t) in_place[t] = places[t];
  call.out = in_place;
  CHECK(torchopt_run(&call) == 0 && call.done == 1);
  for (int t = 0; t < TENSORS; ++t) CHECK(sums[t] == expected[t]);
  free(all);
}

static void test_sums(void) {
  for (int64_t threads = 1; threads < 9; threads += 2) sum_many(threads);
}

static void test_threads(void) {
  const int64_t counts[] = {2, 1, 3, 8, 1000, 2, INT64_MAX, 0, -5};
  for (size_t k = 0; k < sizeof counts / sizeof counts[0]; ++k)
    scale_many(counts[k], k & 1 ? FLOAT32 : FLOAT16, k & 1 ? 2.0f : 0.5f);
}

#define CROWD 4

static void meet(void *barrier, int64_t share) {
  (void)share;
  pthread_barrier_wait(barrier);
}

static ATOMIC int running, most_running;

static void count_running(void *unused, int64_t share) {
  int now = ++running;
  (void)unused;
  (void)share;
  if (now > most_running) most_running = now;
  usleep(200);
  --running;
}

static void test_seats(void) { /* all who are asked come, and nobody else */
  pthread_barrier_t barrier;
  CHECK(pthread_barrier_init(&barrier, NULL, CROWD) == 0);
  for (int round = 0; round < 50; ++round)
    run_in_parallel(meet, &barrier, CROWD, CROWD, CROWD);
  pthread_barrier_destroy(&barrier);
  run_in_parallel(count_running, NULL, 100, 2, 2);
  CHECK(most_running <= 2 && running == 0);
}

static void *call_again_and_again(void *argument) {
  int64_t me = (int64_t)(intptr_t)argument;
  for (int round = 0; round < 8; ++round) {
    torchopt_select(every_set[(round + me) % SETS]);
    scale_many(round % 4 + 1, FLOAT32, me & 1 ? 2.0f : 0.5f);
  }
  return NULL;
}

static void test_callers(void) { /* they meet in the pool, and while the kernels are chosen */
  pthread_t callers[3];
  for (int64_t k = 0; k < 3; ++k)
    CHECK(pthread_create(&callers[k], NULL, call_again_and_again, (void *)(intptr_t)k) == 0);
  for (int k = 0; k < 3; ++k) CHECK(pthread_join(callers[k], NULL) == 0);
}

/* The linker replaces pthread_create by this (--wrap). */
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
#define MANY 100000
static int threads_left = MANY;

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument) {
  if (threads_left <= 0) return EAGAIN;
  --threads_left;
  return __real_pthread_create(thread, attributes, start, argument);
}

static void in_child(void (*test)(void)) {
  int status;
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(TIME_LIMIT);
    threads_left = MANY;
    test();
    _exit(0);
  }
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void call_with_threads(void) { scale_many(3, FLOAT32, 2.0f); }

static void call_with_new_threads(void) {
  call_with_threads();
  CHECK(threads_left == MANY - 2);
}

static void test_fork(void) {
  pthread_t caller;
  call_with_threads(); /* the workers are there now */
  in_child(call_with_new_threads);
  CHECK(pthread_create(&caller, NULL, call_again_and_again, NULL) == 0);
  for (int k = 0; k < 8; ++k) in_child(call_with_new_threads); /* in the middle of another's call */
  CHECK(pthread_join(caller, NULL) == 0);
  call_with_threads();
}

static void call_without_threads(void) {
  threads_left = 0;
  scale_many(4, FLOAT32, 2.0f);
  threads_left = 1;
  scale_many(4, FLOAT32, 2.0f);
  CHECK(threads_left == 0);
  threads_left = MANY;
  scale_many(4, FLOAT32, 2.0f);
  CHECK(threads_left == MANY - 2);
}

static void test_no_threads(void) { in_child(call_without_threads); } /* it starts with none */

static volatile sig_atomic_t signals_seen;

static void see_signal(int number) {
  (void)number;
  ++signals_seen;
}

static void test_signals(void) { /* they are Python's to handle: workers never do */
  sigset_t interrupt, before;
  struct sigaction action, old;
  memset(&action, 0, sizeof action);
  action.sa_handler = see_signal;
  call_with_threads();
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGUSR1);
  CHECK(sigaction(SIGUSR1, &action, &old) == 0);
  CHECK(pthread_sigmask(SIG_BLOCK, &interrupt, &before) == 0);
  CHECK(kill(getpid(), SIGUSR1) == 0);
  usleep(10000);
  CHECK(signals_seen == 0);
  CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
  CHECK(signals_seen == 1);
  sigaction(SIGUSR1, &old, NULL);
}

/* Stands in for GOMP_parallel. */
static ATOMIC int team_calls;
static void (*team_task)(void *);

static void *join_team(void *context) {
  team_task(context);
  return NULL;
}

static void make_team(void (*task)(void *), void *context, unsigned threads, unsigned flags) {
  pthread_t others[CROWD];
  CHECK(threads == CROWD && flags == 0);
  ++team_calls;
  team_task = task;
  for (int k = 1; k < CROWD; ++k)
    CHECK(pthread_create(&others[k], NULL, join_team, context) == 0);
  task(context);
  for (int k = 1; k < CROWD; ++k) CHECK(pthread_join(others[k], NULL) == 0);
}

static void call_without_team(void) { /* in the child of a fork no team is left */
  scale_many(CROWD, FLOAT32, 2.0f);
  CHECK(team_calls == 1);
}

static void test_team(void) {
  torchopt_use_team((void *)(intptr_t)make_team);
  scale_many(CROWD, FLOAT32, 2.0f);
  CHECK(team_calls == 1);
  in_child(call_without_team);
  scale_many(1, FLOAT32, 2.0f);
  CHECK(team_calls == 1);
  torchopt_use_team(NULL);
  scale_many(CROWD, FLOAT32, 2.0f);
  CHECK(team_calls == 1);
}

static const struct test {
  const char *name;
  void (*run)(void);
} tests[] = {
    {"threads", test_threads},
    {"sums", test_sums},
    {"seats", test_seats},
    {"callers", test_callers},
    {"signals", test_signals},
    {"team", test_team},
    {"fork", test_fork},
    {"no_threads", test_no_threads},
    {"half", test_half},
    {"rows", test_rows},
    {"refused", test_refused},
    {"kernels", test_kernels},
    {"programs", test_programs},
    {"any_program", test_any_program},
};
#define TESTS (int)(sizeof tests / sizeof tests[0])

static int is_among(const char *name, int count, char **names) {
  for (int n = 0; n < count; ++n)
    if (strcmp(name, names[n]) == 0) return 1;
  return 0;
}

int main(int count, char **names) {
  int run = 0;
  alarm(TIME_LIMIT);
  for (int k = 0; k < TESTS; ++k) {
    if (count > 1 && !is_among(tests[k].name, count - 1, names + 1)) continue;
    tests[k].run();
    ++run;
  }
  CHECK(run == (count > 1 ? count - 1 : TESTS));
  printf("%s: %d tests passed\n", names[0], run);
  return 0;
}
