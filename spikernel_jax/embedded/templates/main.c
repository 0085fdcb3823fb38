/* Reads images from a file, one after another without a header, and prints a line for each:
   the class, the logits, and the spikes of each LIF layer. */
#include "spikernel.h"

#include <stdio.h>

int main(int count, char **words)
{
    static uint8_t image[SPIKERNEL_HEIGHT * SPIKERNEL_WIDTH * SPIKERNEL_CHANNELS];
    int32_t logits[SPIKERNEL_CLASSES];
    FILE *file;
    size_t read;
    if (count != 2) {
        fprintf(stderr, "usage: %s IMAGES\n", words[0]);
        return 2;
    }
    file = fopen(words[1], "rb");
    if (!file) {
        fprintf(stderr, "error: %s cannot be read\n", words[1]);
        return 2;
    }
    while ((read = fread(image, 1, sizeof image, file)) == sizeof image) {
        printf("%d", spikernel_predict(image, logits));
        for (int i = 0; i < SPIKERNEL_CLASSES; i++) {
            printf(" %ld", (long)logits[i]);
        }
        for (int i = 0; i < SPIKERNEL_SITES; i++) {
            printf(" %ld", (long)spikernel_spikes[i]);
        }
        printf("\n");
    }
    fclose(file);
    if (read) {
        fprintf(stderr, "error: %s ends in the middle of an image\n", words[1]);
        return 2;
    }
    return 0;
}
