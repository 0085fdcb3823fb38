/* @about@ */
#ifndef SPIKERNEL_H
#define SPIKERNEL_H

#include <stdint.h>

#define SPIKERNEL_HEIGHT @height@
#define SPIKERNEL_WIDTH @width@
#define SPIKERNEL_CHANNELS @channels@
#define SPIKERNEL_CLASSES @classes@
#define SPIKERNEL_TIME_STEPS @steps@
#define SPIKERNEL_SITES @sites@          /* LIF layers */
#define SPIKERNEL_WRITTEN_BYTES @written@  /* of static memory that is written to */
#define SPIKERNEL_CONSTANT_BYTES @constants_bytes@ /* of weights and what else is only read */

/* Classifies an image of HEIGHT x WIDTH x CHANNELS pixels, row by row, channels last.
   Fills the logits of all classes and returns the class of the largest, of equals the first. Not reentrant. */
int spikernel_predict(const uint8_t *image, int32_t *logits);

/* Spikes of the last image, of each LIF layer over all time steps. */
extern int32_t spikernel_spikes[SPIKERNEL_SITES];

#endif
