/* @about@ */
#include "spikernel.h"

#include <string.h>
#if defined(__ARM_FEATURE_SAT)
#include <arm_acle.h>
#endif

#define STORED_BITS @stored@ /* of a weight */
#define SPIKES @at_most@       /* of a neuron in a time step, at most */
#define CLIPS @clips@        /* whether currents and membranes are brought to what they can say */
#define CURRENT_BITS @current_bits@
#define LEAST (@least@)
#define MOST @most@
typedef @current@ current_t;

@constants@

static int32_t sums[@widest@];
@memory@
int32_t spikernel_spikes[SPIKERNEL_SITES];
@functions@
int spikernel_predict(const uint8_t *image, int32_t *logits)
{
    int best = 0;
@clear@
    memset(spikernel_spikes, 0, sizeof spikernel_spikes);
@once@
    for (int step = 0; step < SPIKERNEL_TIME_STEPS; step++) {
@step@
    }
@end@
    for (int class = 1; class < SPIKERNEL_CLASSES; class++) {
        if (logits[class] > logits[best]) {
            best = class;
        }
    }
    return best;
}
