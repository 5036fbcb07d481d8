/* Includes TEMPLATE once for each type of element that weights and states may have. */

#define TYPED(name) name##_float
#define ELEMENT float
#define WORD_ELEMENTS 1
#include TEMPLATE
#undef TYPED
#undef ELEMENT
#undef WORD_ELEMENTS

#define TYPED(name) name##_bfloat16
#define ELEMENT uint16_t
#define WORD_ELEMENTS 2
#include TEMPLATE
#undef TYPED
#undef ELEMENT
#undef WORD_ELEMENTS
