//! Deltas: an object as copies from a similar one and insertions, in git's encoding.
//!
//! The encoder skips the common start and end, which cover most of an edited file or of a directory with one
//! new entry, and finds the rest with a rolling hash over blocks of the base. Which object is a good base is
//! decided elsewhere.

/// The length of a block: shorter matches are not found.
const BLOCK: usize = 16;
/// Shorter matches are inserted, since a copy would not be smaller.
const MIN_COPY: usize = 8;
/// The longest copy; its length has three bytes.
const MAX_COPY: usize = 0xff_ffff;
/// The longest insertion.
const MAX_INSERT: usize = 0x7f;
/// The number of blocks with the same hash that are compared, which bounds the work for files of zeroes.
const MAX_CANDIDATES: usize = 48;
/// A match of this length is taken without searching for a longer one.
const LONG_ENOUGH: usize = 8192;
/// From this length on, a changed part is compared with the whole base.
const WORTH_INDEXING_ALL: usize = 256;
const MULTIPLIER: u32 = 0x0100_0193;

/// Why a delta cannot be applied.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("its delta {0}")]
pub(crate) struct BadDelta(&'static str);

/// Encodes `target` as a delta to `base`; `None` if that takes more than `max` bytes.
pub(crate) fn encode(base: &[u8], target: &[u8], max: usize) -> Option<Vec<u8>> {
    if u32::try_from(base.len()).is_err() {
        return None;
    }
    let shorter = base.len().min(target.len());
    let prefix = base.iter().zip(target).take_while(|(a, b)| a == b).count();
    let suffix = base.iter().rev().zip(target.iter().rev()).take(shorter - prefix).take_while(|(a, b)| a == b).count();
    let mut out = DeltaWriter { bytes: Vec::new(), literal: 0, max };
    put_size(&mut out.bytes, base.len());
    put_size(&mut out.bytes, target.len());
    let end = target.len() - suffix;
    if prefix >= MIN_COPY {
        out.copy(target, 0, 0, prefix)?;
    }
    if prefix < end {
        let within = if end - prefix < WORTH_INDEXING_ALL { prefix..base.len() - suffix } else { 0..base.len() };
        let start = if prefix >= MIN_COPY { prefix } else { 0 };
        encode_middle(base, within, target, start, end, &mut out)?;
    }
    if suffix >= MIN_COPY {
        out.copy(target, end, base.len() - suffix, suffix)?;
    }
    out.insert_until(target, target.len())?;
    Some(out.bytes)
}

/// Encodes `target[start..end]`, with blocks of `base[within]`.
fn encode_middle(
    base: &[u8],
    within: std::ops::Range<usize>,
    target: &[u8],
    start: usize,
    end: usize,
    out: &mut DeltaWriter,
) -> Option<()> {
    if within.len() < BLOCK || end - start < BLOCK {
        return Some(());
    }
    let index = Blocks::of(base, within);
    let mut at = start;
    let mut hash = hash_of(&target[at..at + BLOCK]);
    loop {
        if let Some((from, length, back)) = index.longest(base, target, at, end, out.literal, hash) {
            out.copy(target, at - back, from - back, length + back)?;
            at += length;
            if at + BLOCK > end {
                return Some(());
            }
            hash = hash_of(&target[at..at + BLOCK]);
        } else {
            if at + BLOCK >= end {
                return Some(());
            }
            hash = roll(hash, target[at], target[at + BLOCK]);
            at += 1;
            // The bytes before `at` would be inserted; a delta that consists of insertions is useless.
            if at - out.literal > out.max {
                return None;
            }
        }
    }
}

struct DeltaWriter {
    bytes: Vec<u8>,
    /// The offset in the target from which bytes are not written yet.
    literal: usize,
    max: usize,
}

impl DeltaWriter {
    fn insert_until(&mut self, target: &[u8], end: usize) -> Option<()> {
        for piece in target.get(self.literal..end).unwrap_or_default().chunks(MAX_INSERT) {
            self.bytes.push(piece.len() as u8);
            self.bytes.extend_from_slice(piece);
        }
        self.literal = self.literal.max(end);
        (self.bytes.len() <= self.max).then_some(())
    }

    /// Writes a copy of `length` bytes at `from` in the base to `to` in the target.
    fn copy(&mut self, target: &[u8], to: usize, from: usize, length: usize) -> Option<()> {
        self.insert_until(target, to)?;
        let (mut from, mut left) = (from, length);
        while left > 0 {
            let length = left.min(MAX_COPY);
            let head = self.bytes.len();
            self.bytes.push(0x80);
            let mut flags = 0x80;
            let fields =
                (from as u32).to_le_bytes().into_iter().chain((length as u32).to_le_bytes().into_iter().take(3));
            for (bit, byte) in fields.enumerate().filter(|(_, byte)| *byte != 0) {
                flags |= 1 << bit;
                self.bytes.push(byte);
            }
            self.bytes[head] = flags;
            from += length;
            left -= length;
        }
        self.literal = to + length;
        (self.bytes.len() <= self.max).then_some(())
    }
}

/// The blocks of a base by their hash: one chain of block numbers per bucket.
struct Blocks {
    start: usize,
    end: usize,
    shift: u32,
    heads: Vec<u32>,
    next: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Blocks {
    fn of(base: &[u8], within: std::ops::Range<usize>) -> Blocks {
        let count = within.len() / BLOCK;
        let bits = (count.max(2) as u32).next_power_of_two().trailing_zeros().clamp(4, 22);
        let mut blocks = Blocks {
            start: within.start,
            end: within.end,
            shift: 32 - bits,
            heads: vec![NONE; 1 << bits],
            next: vec![NONE; count],
        };
        // Backwards, so that each chain begins with the first block.
        for number in (0..count).rev() {
            let at = within.start + number * BLOCK;
            let bucket = blocks.bucket(hash_of(&base[at..at + BLOCK]));
            blocks.next[number] = blocks.heads[bucket];
            blocks.heads[bucket] = number as u32;
        }
        blocks
    }

    fn bucket(&self, hash: u32) -> usize {
        (hash.wrapping_mul(0x9e37_79b1) >> self.shift) as usize
    }

    /// Finds the longest match of the base with the target around `at`, not before `literal`. Returns its
    /// offset in the base, its length from `at` on, and its length before `at`.
    fn longest(
        &self,
        base: &[u8],
        target: &[u8],
        at: usize,
        end: usize,
        literal: usize,
        hash: u32,
    ) -> Option<(usize, usize, usize)> {
        let mut best: Option<(usize, usize, usize)> = None;
        let mut number = self.heads[self.bucket(hash)];
        for _ in 0..MAX_CANDIDATES {
            if number == NONE {
                break;
            }
            let from = self.start + number as usize * BLOCK;
            number = self.next[number as usize];
            if base[from..from + BLOCK] != target[at..at + BLOCK] {
                continue;
            }
            let ahead = base[from..self.end].iter().zip(&target[at..end]).take_while(|(a, b)| a == b).count();
            let before = base[..from].iter().rev().zip(target[literal..at].iter().rev());
            let back = before.take_while(|(a, b)| a == b).count();
            if best.is_none_or(|(_, length, behind)| ahead + back > length + behind) {
                best = Some((from, ahead, back));
                if ahead + back >= LONG_ENOUGH {
                    break;
                }
            }
        }
        best
    }
}

fn hash_of(block: &[u8]) -> u32 {
    block.iter().fold(0, |hash: u32, byte| hash.wrapping_mul(MULTIPLIER).wrapping_add(u32::from(*byte) + 1))
}

/// The weight of the byte that leaves the window: the multiplier to the power of `BLOCK - 1`.
const LEAVING: u32 = {
    let mut power: u32 = 1;
    let mut n = 1;
    while n < BLOCK {
        power = power.wrapping_mul(MULTIPLIER);
        n += 1;
    }
    power
};

fn roll(hash: u32, leaves: u8, enters: u8) -> u32 {
    let rest = hash.wrapping_sub((u32::from(leaves) + 1).wrapping_mul(LEAVING));
    rest.wrapping_mul(MULTIPLIER).wrapping_add(u32::from(enters) + 1)
}

fn put_size(out: &mut Vec<u8>, mut size: usize) {
    while size >= 0x80 {
        out.push((size & 0x7f) as u8 | 0x80);
        size >>= 7;
    }
    out.push(size as u8);
}

/// Returns the size of the object that a delta encodes, as stated in the delta.
pub(crate) fn target_size(delta: &[u8]) -> Result<u64, BadDelta> {
    let mut ops = Ops(delta);
    ops.size()?;
    ops.size()
}

/// Applies a delta to its base.
pub(crate) fn apply(base: &[u8], delta: &[u8]) -> Result<Vec<u8>, BadDelta> {
    let mut ops = Ops(delta);
    if ops.size()? != base.len() as u64 {
        return Err(BadDelta("belongs to another base"));
    }
    let size = ops.size()?;
    let mut target = Vec::with_capacity(size.min(64 << 20) as usize);
    while let Some(op) = ops.next() {
        if op & 0x80 == 0 {
            target.extend_from_slice(ops.take(usize::from(op))?);
        } else {
            let mut fields = [0_u8; 8];
            for (bit, field) in fields.iter_mut().enumerate().take(7) {
                if op & (1 << bit) != 0 {
                    *field = ops.byte()?;
                }
            }
            let [a, b, c, d, e, f, g, _] = fields;
            let (from, length) = (u32::from_le_bytes([a, b, c, d]) as usize, u32::from_le_bytes([e, f, g, 0]) as usize);
            // Git encodes this length as 0.
            let length = if length == 0 { 0x1_0000 } else { length };
            let piece = from.checked_add(length).and_then(|end| base.get(from..end));
            target.extend_from_slice(piece.ok_or(BadDelta("copies from beyond its base"))?);
        }
        if target.len() as u64 > size {
            break;
        }
    }
    if target.len() as u64 == size { Ok(target) } else { Err(BadDelta("produces another size than it states")) }
}

struct Ops<'a>(&'a [u8]);

impl<'a> Ops<'a> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn byte(&mut self) -> Result<u8, BadDelta> {
        self.next().ok_or(BadDelta("is cut off"))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], BadDelta> {
        if count == 0 {
            return Err(BadDelta("contains a reserved operation"));
        }
        let (taken, rest) = self.0.split_at_checked(count).ok_or(BadDelta("is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn size(&mut self) -> Result<u64, BadDelta> {
        let mut size = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            size |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(size);
            }
        }
        Err(BadDelta("has an invalid size"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn both_ways(base: &[u8], target: &[u8]) -> usize {
        let delta = encode(base, target, usize::MAX).unwrap();
        assert_eq!(apply(base, &delta).unwrap(), target);
        delta.len()
    }

    fn text(lines: usize) -> Vec<u8> {
        (0..lines).flat_map(|n| format!("line {n} of {}\n", n * 7919 % 1013).into_bytes()).collect()
    }

    #[test]
    fn an_edit_costs_what_was_edited() {
        let base = text(5000);
        let mut target = base.clone();
        target.splice(20_000..20_010, *b"something else");
        target.splice(60_000..60_000, *b"and inserted here");
        target.extend_from_slice(b"and at the end");
        assert!(both_ways(&base, &target) < 120);
        assert!(both_ways(&target, &base) < 120);
    }

    #[test]
    fn what_moved_is_found() {
        let base = text(2000);
        let (front, back) = base.split_at(base.len() / 2);
        assert!(both_ways(&base, &[back, front].concat()) < 60);
    }

    #[test]
    fn a_tree_with_two_new_ids_costs_little_more_than_these() {
        let entry = |n: u32, version: u32| {
            let id =
                crate::store::oid::Oid::of(crate::store::oid::ObjectKind::Blob, format!("{n} {version}").as_bytes());
            [format!("100644 file{n:04}\0").as_bytes(), id.raw()].concat()
        };
        let base: Vec<u8> = (0..800).flat_map(|n| entry(n, 0)).collect();
        let target: Vec<u8> = (0..800).flat_map(|n| entry(n, u32::from(n == 100 || n == 600))).collect();
        assert!(both_ways(&base, &target) < 75);
    }

    #[test]
    fn copies_longer_than_one_operation_are_split() {
        let base = vec![5; MAX_COPY + 70_000];
        let target = [&base[..], b"x"].concat();
        assert!(both_ways(&base, &target) < 40);
        assert!(both_ways(&target, &base) < 40);
    }

    #[test]
    fn a_delta_that_would_be_too_long_is_given_up() {
        let base: Vec<u8> = (0..4000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let other: Vec<u8> = (0..4000_u32).flat_map(|n| n.wrapping_mul(40_503).rotate_left(9).to_le_bytes()).collect();
        assert_eq!(encode(&base, &other, other.len() / 2), None);
    }

    #[test]
    fn a_delta_that_makes_no_sense_is_refused() {
        let delta = encode(b"0123456789abcdef0123", b"0123456789abcdef0123 and more", usize::MAX).unwrap();
        assert_eq!(apply(b"another base", &delta), Err(BadDelta("belongs to another base")));
        for cut in 0..delta.len() {
            assert!(apply(b"0123456789abcdef0123", &delta[..cut]).is_err());
        }
        assert_eq!(apply(b"", &[0, 1, 0]), Err(BadDelta("contains a reserved operation")));
        assert_eq!(apply(b"", &[0x80; 12]), Err(BadDelta("has an invalid size")));
    }

    proptest! {
        #![proptest_config(fermata_test_seeds::cases(256))]

        #[test]
        fn every_pair_of_texts_comes_back(
            pieces in proptest::collection::vec(proptest::collection::vec(0_u8..4, 0..80), 1..6),
            order in proptest::collection::vec(0_usize..6, 0..12),
            tail in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let base = pieces.concat();
            let mut target: Vec<u8> = order.iter().flat_map(|n| pieces[n % pieces.len()].clone()).collect();
            target.extend_from_slice(&tail);
            both_ways(&base, &target);
            both_ways(&target, &base);
        }

        #[test]
        fn no_bytes_make_applying_panic(base in proptest::collection::vec(any::<u8>(), 0..60), delta in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _either = apply(&base, &delta);
        }
    }
}
