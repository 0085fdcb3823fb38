/* What an MPS2 board of Arm needs to begin, and a count of the instructions that spikernel_predict takes.

   Meant for an emulator whose clock goes on by one nanosecond an instruction (qemu-system-arm -icount shift=0), on a
   board of 25 MHz: a tick is 40 instructions. Linked with --wrap=spikernel_predict. */
#include "spikernel.h"

#include <stdio.h>
#include <stdlib.h>

#define INSTRUCTIONS_A_TICK 40u
#define LAST 0xFFFFFFu

extern char __stack[];
extern void _start(void);

/* SysTick: control, the value that it begins with, and what is left of it. */
static volatile uint32_t *const systick = (volatile uint32_t *)0xE000E010u;
static volatile uint32_t turns;
static uint64_t ticks;
static uint32_t images;

static void turned(void)
{
    turns++;
}

static void fault(void)
{
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    __stack, _start, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, turned,
};

static void report(void)
{
    fprintf(stderr, "%lu instructions an image\n", (unsigned long)(ticks * INSTRUCTIONS_A_TICK / images));
}

int __real_spikernel_predict(const uint8_t *image, int32_t *logits);

int __wrap_spikernel_predict(const uint8_t *image, int32_t *logits)
{
    int class;
    uint32_t left;
    if (!images++) {
        atexit(report);
    }
    turns = 0;
    systick[1] = LAST;
    systick[2] = 0;
    systick[0] = 7;
    class = __real_spikernel_predict(image, logits);
    left = systick[2];
    systick[0] = 0;
    ticks += (uint64_t)turns * (LAST + 1u) + (LAST - left);
    return class;
}
