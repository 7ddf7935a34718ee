/* The least that patching in place can cost: reads the touched rows, hashes them, journals them, adds the deltas, hashes the
 * result, writes it, and syncs in the order that makes a change safe. No checks beyond the digests, no undo record beside the
 * journal, one thread. bench/_floor.py compiles it and writes its job.
 *
 * Usage: floor apply|revert JOB MODEL FOLDER. `revert` puts back what the journal holds. The job is little endian: u64 tensors, then for each u64 offset of the tensor in MODEL, u64
 * elements of a row, u64 rows, u64 deltas, the SHA-256 of the rows before and after, i64 [rows] row numbers, i32 [rows] delta
 * numbers, f32 [deltas, elements]. Rows are bfloat16. */
#include <fcntl.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct tensor {
    uint64_t offset, elements, rows, deltas;
    const unsigned char *before, *after;
    const int64_t *row;
    const int32_t *delta_of;
    const float *delta;
    uint16_t *data;
};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static EVP_MD_CTX *sha256(void) {
    EVP_MD_CTX *state = EVP_MD_CTX_new();
    if (!state || !EVP_DigestInit_ex(state, EVP_sha256(), NULL)) fail("sha256");
    return state;
}

static void end(EVP_MD_CTX *state, unsigned char found[32]) {
    EVP_DigestFinal_ex(state, found, NULL);
    EVP_MD_CTX_free(state);
}

static void require(const void *data, size_t bytes, const unsigned char wanted[32], const char *what) {
    unsigned char found[32];
    EVP_MD_CTX *state = sha256();
    EVP_DigestUpdate(state, data, bytes);
    end(state, found);
    if (memcmp(found, wanted, 32)) {
        fprintf(stderr, "%s: another digest\n", what);
        exit(1);
    }
}

static void put(int file, const void *data, size_t bytes) {
    for (const char *at = data; bytes;) {
        ssize_t done = write(file, at, bytes);
        if (done <= 0) fail("write");
        at += done;
        bytes -= (size_t)done;
    }
}

static void sync_all(int file) {
    if (fsync(file)) fail("fsync");
}

static int create(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file < 0) fail(path);
    return file;
}

static void read_rows(int model, struct tensor *t) {
    size_t width = t->elements * 2;
    if (!(t->data = malloc(t->rows * width))) fail("malloc");
    for (uint64_t i = 0; i < t->rows; i++)
        if (pread(model, t->data + i * t->elements, width, (off_t)(t->offset + (uint64_t)t->row[i] * width)) != (ssize_t)width)
            fail("pread");
}

/* float32 addition, rounded to the nearest bfloat16, ties to even. */
static void merge(struct tensor *t) {
    for (uint64_t i = 0; i < t->rows; i++) {
        uint16_t *row = t->data + i * t->elements;
        const float *delta = t->delta + (uint64_t)t->delta_of[i] * t->elements;
        for (uint64_t k = 0; k < t->elements; k++) {
            uint32_t bits = (uint32_t)row[k] << 16;
            float value;
            memcpy(&value, &bits, 4);
            value += delta[k];
            memcpy(&bits, &value, 4);
            row[k] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    }
}

static void write_rows(int model, const struct tensor *t) {
    size_t width = t->elements * 2;
    for (uint64_t i = 0; i < t->rows; i++)
        if (pwrite(model, t->data + i * t->elements, width, (off_t)(t->offset + (uint64_t)t->row[i] * width)) != (ssize_t)width)
            fail("pwrite");
}

static const void *take(const char **at, size_t bytes) {
    const void *found = *at;
    *at += bytes;
    return found;
}

static uint64_t read_job(const char *path, struct tensor **found) {
    struct stat size;
    int job = open(path, O_RDONLY);
    if (job < 0 || fstat(job, &size)) fail(path);
    const char *at = mmap(NULL, (size_t)size.st_size, PROT_READ, MAP_PRIVATE, job, 0);
    if (at == MAP_FAILED) fail("mmap");
    uint64_t tensors = *(const uint64_t *)take(&at, 8);
    struct tensor *all = calloc(tensors, sizeof *all);
    if (!all) fail("calloc");
    for (struct tensor *t = all; t < all + tensors; t++) {
        memcpy(&t->offset, take(&at, 32), 32);
        t->before = take(&at, 32);
        t->after = take(&at, 32);
        t->row = take(&at, 8 * t->rows);
        t->delta_of = take(&at, 4 * t->rows);
        t->delta = take(&at, 4 * t->deltas * t->elements);
    }
    *found = all;
    return tensors;
}

static void commit(const char *folder, int place, const unsigned char seal[32]) {
    char old[4096], new[4096];
    int ledger = create(folder, "ledger.new");
    put(ledger, seal, 32);
    sync_all(ledger);
    snprintf(old, sizeof old, "%s/ledger.new", folder);
    snprintf(new, sizeof new, "%s/ledger", folder);
    if (rename(old, new)) fail("rename");
    sync_all(place);
}

static void apply(struct tensor *all, uint64_t tensors, int model, const char *folder, int place) {
    unsigned char seal[32];
    int journal = create(folder, "journal");
    EVP_MD_CTX *whole = sha256();
    for (struct tensor *t = all; t < all + tensors; t++) {
        size_t bytes = t->rows * t->elements * 2;
        read_rows(model, t);
        require(t->data, bytes, t->before, "the base");
        EVP_DigestUpdate(whole, t->data, bytes);
        put(journal, t->data, bytes);
    }
    end(whole, seal);
    put(journal, seal, sizeof seal);
    sync_all(journal);
    sync_all(place);
    for (struct tensor *t = all; t < all + tensors; t++) {
        merge(t);
        require(t->data, t->rows * t->elements * 2, t->after, "the result");
        write_rows(model, t);
    }
    sync_all(model);
    commit(folder, place, seal);
}

static void revert(struct tensor *all, uint64_t tensors, int model, const char *folder, int place) {
    char path[4096];
    unsigned char none[32] = {0};
    snprintf(path, sizeof path, "%s/journal", folder);
    int journal = open(path, O_RDONLY);
    if (journal < 0) fail(path);
    for (struct tensor *t = all; t < all + tensors; t++) {
        size_t bytes = t->rows * t->elements * 2;
        read_rows(model, t);
        require(t->data, bytes, t->after, "the result");
        if (read(journal, t->data, bytes) != (ssize_t)bytes) fail("read");
        require(t->data, bytes, t->before, "the journal");
        write_rows(model, t);
        free(t->data);
    }
    sync_all(model);
    commit(folder, place, none);
}

int main(int count, char **words) {
    if (count != 5) return 2;
    struct tensor *all;
    uint64_t tensors = read_job(words[2], &all);
    int model = open(words[3], O_RDWR), place = open(words[4], O_RDONLY);
    if (model < 0 || place < 0) fail("open");
    (strcmp(words[1], "revert") ? apply : revert)(all, tensors, model, words[4], place);
    return 0;
}
