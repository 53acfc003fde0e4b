from collections import Counter

from group_sampling.data.batching import BatchesBySize


def batches(images, batch_size):
    return list(BatchesBySize(images, batch_size, lambda image: image[0]))


def test_one_by_one_keeps_the_order():
    images = [("a", 0), ("b", 1), (None, 2), ("a", 3)]
    assert batches(images, 1) == [[image] for image in images] and len(BatchesBySize(images, 1, id)) == 4


def test_a_batch_is_of_one_size():
    """Each image comes once, and what has no size by itself."""
    images = [("abc"[k % 3] if k % 7 else None, k) for k in range(50)]
    found = batches(images, 4)
    assert Counter(image for batch in found for image in batch) == Counter(images)
    assert max(map(len, found)) == 4 and all(len({size for size, _ in batch}) == 1 for batch in found)
    assert all(len(batch) == 1 for batch in found if batch[0][0] is None)
    assert all(len(batch) == 4 for batch in found[:-3] if batch[0][0] is not None)


def test_few_images_wait():
    """An image of a rare size does not wait for the end, and never more than eight batches' worth do."""
    images = [("rare", -1), *((str(k // 2), k) for k in range(200))]
    seen, given, largest = [], [], 0

    class Noting(list):
        def __iter__(self):
            for image in super().__iter__():
                seen.append(image)
                yield image

    for batch in BatchesBySize(Noting(images), 3, lambda image: image[0]):
        largest = max(largest, len(seen) - len(given))
        given += batch
        if ("rare", -1) in batch:
            assert len(seen) == 25
    assert sorted(given) == sorted(images) and largest == 25
