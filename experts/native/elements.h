/* Numbers of one element type: include with TYPED(name), ELEMENT and WORD_ELEMENTS (1: float, 2: bfloat16). */

#if WORD_ELEMENTS == 1
#define LARGEST 3.40282346638528859811704183484516925e+38f
INLINE float TYPED(one)(ELEMENT value) { return value; }
INLINE ELEMENT TYPED(element)(float value) { return value; }
INLINE floats TYPED(rounded)(floats value) { return value; }
#else
#define LARGEST 3.38953138925153547590470800371487867e+38f
INLINE float TYPED(one)(ELEMENT value) { return float_of(value); }
INLINE ELEMENT TYPED(element)(float value) { return half_of(value); }
INLINE floats TYPED(rounded)(floats value) { return floats_of(halves_of(value)); }
#endif

/* Up to 16 numbers; those beyond count are not touched, or read as zero. */
INLINE void TYPED(store)(ELEMENT *to, floats value, int64_t count) {
#if WORD_ELEMENTS == 1
  memcpy(to, &value, (size_t)(count < LANES ? count : LANES) * sizeof *to);
#else
  halves rounded = halves_of(value);
  memcpy(to, &rounded, (size_t)(count < LANES ? count : LANES) * sizeof *to);
#endif
}

INLINE floats TYPED(load)(const ELEMENT *from, int64_t count) {
#if WORD_ELEMENTS == 1
  floats loaded = all(0);
  memcpy(&loaded, from, (size_t)(count < LANES ? count : LANES) * sizeof *from);
  return loaded;
#else
  halves loaded = {0};
  memcpy(&loaded, from, (size_t)(count < LANES ? count : LANES) * sizeof *from);
  return floats_of(loaded);
#endif
}
