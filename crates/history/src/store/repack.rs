//! Writes several packs as one: the needed objects, well compressed, versions as deltas.
//!
//! ```text
//! gather   the needed entries of the packs, deltas with their present base
//! choose   bases for the others: the previous version, in steps that keep chains short
//! write    bases first; good entries are copied without decompressing them
//! check    read everything back from the new pack
//! ```
//!
//! The pack is self-contained: the base of a delta is always in it, as git requires. Existing packs are not
//! changed.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::errors::{HistoryError, Result};
use crate::progress::{OnProgress, StorePhase, StoreProgress};
use crate::store::deflate::{Effort, deflate};
use crate::store::delta;
use crate::store::oid::{ObjectHasher, ObjectKind, Oid};
use crate::store::pack::{FinishedPack, PackWriter};
use crate::store::pack_entry::{EntryHeader, Stored, bad};
use crate::store::pack_index::PackIndex;
use crate::store::pack_reader::{ContentCache, PackReader};
use crate::store::reachability::{Reachability, ReachableObject};

/// The longest chain of deltas.
pub(crate) const MAX_DEPTH: u32 = 50;
/// Every 16th version refers to the one 16 before, so that the length of chains grows with the logarithm of the
/// versions.
const STRIDE: u32 = 16;
/// Larger objects are copied unchanged, since they must not be in memory.
const LARGE: u64 = 8 << 20;
/// Larger files are not compared with similarly named ones.
const LARGEST_LIKENESS: u64 = 512 << 10;
/// The longest chain of deltas between similarly named files, so that first versions are read fast.
const LIKENESS_DEPTH: u32 = 6;
/// Smaller objects do not profit from a base.
const SMALLEST_DELTA: u64 = 48;
/// Up to this size an object of a fresh pack is always compressed again, so that the compression level tells
/// fresh packs from consolidated ones.
const ALWAYS_COMPRESSED: u64 = 64 << 10;

/// The numbers of dropped and converted entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Entries that are not needed, or that another pack has.
    pub dropped: u64,
    /// Entries stored as deltas.
    pub deltas: u64,
}

/// An entry of the new pack.
struct RepackItem {
    node: u32,
    kind: ObjectKind,
    pack: usize,
    at: u64,
    length: u64,
    crc: u32,
    header: EntryHeader,
    base: Option<u32>,
    method: EntryMethod,
    /// The longest chain of deltas that ends at this entry.
    height: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EntryMethod {
    /// Copy the compressed bytes.
    Copy,
    /// Compress again, as a delta if there is a base and the delta is smaller.
    Compress,
}

/// The effort for a small result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RepackEffort {
    /// Copies entries unchanged unless that is impossible.
    Fast,
    /// Compresses the entries of fresh packs again, versions as deltas.
    Thorough,
}

/// The packs to be merged, and the plan for their entries.
pub(crate) struct Repack<'a> {
    needed: &'a Reachability,
    packs: Vec<PackReader>,
    fresh: Vec<bool>,
    items: Vec<RepackItem>,
    /// The index in `items` by the number of the node.
    by_node: HashMap<u32, u32>,
    cache: ContentCache,
    counts: Counts,
}

impl<'a> Repack<'a> {
    /// Gathers the needed entries and decides how each one is stored. `elsewhere` says whether the copy of an
    /// object in a pack is left out, since another pack has it.
    ///
    /// # Errors
    /// Fails when a pack is damaged.
    pub fn plan(
        needed: &'a Reachability,
        packs: Vec<PackReader>,
        effort: RepackEffort,
        elsewhere: impl Fn(&str, &Oid) -> bool,
    ) -> Result<Repack<'a>> {
        let fresh = packs.iter().map(|pack| effort == RepackEffort::Thorough && pack.is_fresh()).collect();
        let (items, by_node, counts) = (Vec::new(), HashMap::new(), Counts::default());
        let mut repack = Repack { needed, packs, fresh, items, by_node, cache: ContentCache::default(), counts };
        for pack in 0..repack.packs.len() {
            repack.gather(pack, &elsewhere).map_err(HistoryError::io("read pack", name(&repack.packs[pack])))?;
        }
        repack.keep_deltas().map_err(HistoryError::io("read packs of", Path::new("history.git")))?;
        if effort == RepackEffort::Thorough {
            repack.choose_bases();
            repack.choose_likenesses();
        }
        Ok(repack)
    }

    /// Returns the number of objects in the new pack.
    pub fn objects(&self) -> usize {
        self.items.len()
    }

    fn gather(&mut self, pack: usize, elsewhere: impl Fn(&str, &Oid) -> bool) -> io::Result<()> {
        let reader = self.packs[pack].clone();
        let layout = reader.index.layout()?;
        let end = reader.length()?.saturating_sub(20);
        let ends = layout.iter().skip(1).map(|(at, _)| *at).chain([end]);
        for ((at, n), end) in layout.iter().copied().zip(ends) {
            let Some(oid) = reader.index.oid(n as usize) else { continue };
            let node = self.needed.number(&oid).filter(|_| !elsewhere(&reader.index.name, &oid));
            let Some(node) = node.filter(|node| !self.by_node.contains_key(node)) else {
                self.counts.dropped += 1;
                continue;
            };
            let header = reader.header(at)?;
            let length = end.checked_sub(at).filter(|length| *length > header.length as u64);
            let length = length.ok_or_else(|| bad(format!("the entry of {oid} has no content")))?;
            let method =
                if self.fresh[pack] && header.size <= LARGE { EntryMethod::Compress } else { EntryMethod::Copy };
            self.by_node.insert(node, self.items.len() as u32);
            let (kind, crc) = (self.needed.nodes()[node as usize].kind, reader.index.crc(n as usize));
            self.items.push(RepackItem { node, kind, pack, at, length, crc, header, base: None, method, height: 0 });
        }
        Ok(())
    }

    /// Finds the bases of existing deltas. An entry whose base is not in the new pack is compressed again.
    fn keep_deltas(&mut self) -> io::Result<()> {
        let mut layouts = HashMap::new();
        for n in 0..self.items.len() {
            let RepackItem { pack, at, header, .. } = self.items[n];
            let reader = &self.packs[pack];
            let Some(base) = reader.base_of(at, &header)? else { continue };
            let layout = match layouts.entry(pack) {
                std::collections::hash_map::Entry::Occupied(layout) => layout.into_mut(),
                std::collections::hash_map::Entry::Vacant(place) => place.insert(reader.index.layout()?),
            };
            let position = layout.binary_search_by_key(&base, |(at, _)| *at);
            let position = position.map_err(|_| bad("a delta has no base".to_owned()))?;
            let base = reader.index.oid(layout[position].1 as usize);
            let base = base.and_then(|oid| self.by_node.get(&self.needed.number(&oid)?)).copied();
            match base {
                Some(base) if self.can_be_base(base, n as u32) => self.set_base(n as u32, base),
                Some(_) | None => self.items[n].method = EntryMethod::Compress,
            }
        }
        Ok(())
    }

    /// Says whether a delta to `base` keeps chains finite and short.
    fn can_be_base(&self, base: u32, of: u32) -> bool {
        let mut depth = 1;
        let mut at = base;
        loop {
            if at == of || depth + self.items[of as usize].height > MAX_DEPTH {
                return false;
            }
            match self.items[at as usize].base {
                Some(next) => at = next,
                None => return true,
            }
            depth += 1;
        }
    }

    fn set_base(&mut self, of: u32, base: u32) {
        self.items[of as usize].base = Some(base);
        let mut height = self.items[of as usize].height;
        let mut at = Some(base);
        while let Some(n) = at {
            height += 1;
            let item = &mut self.items[n as usize];
            item.height = item.height.max(height);
            at = item.base;
        }
    }

    fn choose_bases(&mut self) {
        let mut order: Vec<u32> = (0..self.items.len() as u32).collect();
        order.sort_unstable_by_key(|n| self.items[*n as usize].node);
        for n in order {
            let item = &self.items[n as usize];
            if item.base.is_some() || item.header.size > LARGE || item.length < SMALLEST_DELTA {
                continue;
            }
            let pack = item.pack;
            let chosen = self.candidates(item.node).into_iter().find(|base| {
                let candidate = &self.items[*base as usize];
                // Two objects of one consolidated pack were compared when it was written.
                candidate.header.size <= LARGE
                    && (candidate.pack != pack || self.fresh[pack])
                    && self.can_be_base(*base, n)
            });
            if let Some(base) = chosen {
                self.set_base(n, base);
                self.items[n as usize].method = EntryMethod::Compress;
            }
        }
    }

    /// Tries a delta between a file without an earlier version and a similarly named, larger file, as git does.
    fn choose_likenesses(&mut self) {
        let nodes = self.needed.nodes();
        let is_lone = |n: &u32| {
            let item = &self.items[*n as usize];
            let sizes = SMALLEST_DELTA * 2..LARGEST_LIKENESS;
            self.fresh[item.pack]
                && item.kind == ObjectKind::Blob
                && item.base.is_none()
                && sizes.contains(&item.header.size)
        };
        let mut order: Vec<u32> = (0..self.items.len() as u32).filter(is_lone).collect();
        let key = |n: &u32| {
            let item = &self.items[*n as usize];
            (nodes[item.node as usize].likeness, std::cmp::Reverse(item.header.size), item.node)
        };
        order.sort_unstable_by_key(key);
        for pair in 1..order.len() {
            let (base, n) = (order[pair - 1], order[pair]);
            let (larger, smaller) = (self.items[base as usize].header.size, self.items[n as usize].header.size);
            if smaller <= larger
                && larger / 4 <= smaller
                && self.depth(base) < LIKENESS_DEPTH
                && self.can_be_base(base, n)
            {
                self.set_base(n, base);
            }
        }
    }

    fn depth(&self, n: u32) -> u32 {
        let mut depth = 0;
        let mut at = n;
        while let Some(base) = self.items[at as usize].base {
            depth += 1;
            at = base;
        }
        depth
    }

    /// Lists delta bases for a version, the best first: the previous version, except that every 16th refers to
    /// the one 16 before, every 256th to the one 256 before, and so on.
    fn candidates(&self, node: u32) -> Vec<u32> {
        let nodes = self.needed.nodes();
        let ReachableObject { version, before, .. } = nodes[node as usize];
        let mut step = 1;
        while version > 0 && version.is_multiple_of(step * STRIDE) {
            step *= STRIDE;
        }
        let mut far = Some(node);
        for _ in 0..step {
            far = far.and_then(|node| nodes[node as usize].before);
        }
        let item = |node: Option<u32>| node.and_then(|node| self.by_node.get(&node)).copied();
        let mut found: Vec<u32> = item(far).into_iter().chain(item(before)).collect();
        found.dedup();
        found
    }

    /// Writes the new pack into an own directory, flushes it and reads it back.
    ///
    /// # Errors
    /// Fails when an old pack is damaged, when the new one cannot be written, or when cancelled.
    pub fn write(
        mut self,
        dir: &Path,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<(FinishedPack, Counts)> {
        let failed = |error| HistoryError::io("write a pack in", dir)(error);
        let mut pack = PackWriter::create(dir).map_err(failed)?;
        let mut written = vec![false; self.items.len()];
        let mut order: Vec<u32> = (0..self.items.len() as u32).collect();
        let rank = |item: &RepackItem| match item.kind {
            ObjectKind::Commit => 0,
            ObjectKind::Tree => 1,
            ObjectKind::Blob => 2 + u8::from(item.header.size > LARGE),
        };
        order.sort_unstable_by_key(|n| (rank(&self.items[*n as usize]), self.items[*n as usize].node));
        let total = 2 * order.len() as u64;
        let mut done = 0;
        for n in order {
            // A delta follows its base.
            let mut chain = vec![n];
            while let Some(base) = self.items[chain[chain.len() - 1] as usize].base {
                if written[base as usize] {
                    break;
                }
                chain.push(base);
            }
            for n in chain.into_iter().rev().filter(|n| !std::mem::replace(&mut written[*n as usize], true)) {
                if cancel.load(Ordering::Relaxed) {
                    return Err(HistoryError::Cancelled);
                }
                self.put(n, &mut pack)?;
                done += 1;
                if done % 256 == 0 {
                    progress(StoreProgress { phase: StorePhase::Pack, done, total });
                }
            }
        }
        self.cache.clear();
        let finished = pack.finish().map_err(failed)?;
        self.check(&finished, dir, done, progress, cancel)?;
        Ok((finished, self.counts))
    }

    fn put(&mut self, n: u32, pack: &mut PackWriter) -> Result<()> {
        let item = &self.items[n as usize];
        let (oid, reader) = (self.oid(n), &self.packs[item.pack]);
        let compressed = match item.method {
            EntryMethod::Copy => None,
            EntryMethod::Compress => self.compress(n).map_err(HistoryError::io("read an object of", name(reader)))?,
        };
        let failed = HistoryError::io("write to the pack beside", name(reader));
        match compressed {
            Some(Compressed { base, size, zlib }) => {
                self.counts.deltas += u64::from(base.is_some());
                pack.append_deflated(oid, item.kind, base.as_ref(), size, &zlib).map_err(failed)
            }
            None => {
                let base = match item.header.stored {
                    Stored::Complete(_) => None,
                    Stored::DeltaAt(_) | Stored::DeltaTo(_) => item.base.map(|base| self.oid(base)),
                };
                self.counts.deltas += u64::from(base.is_some());
                let place = (item.at, item.length, item.crc);
                pack.append_copy(oid, item.kind, base.as_ref(), reader, place).map_err(failed)
            }
        }
    }

    fn oid(&self, n: u32) -> Oid {
        self.needed.nodes()[self.items[n as usize].node as usize].oid
    }

    fn content(&self, n: u32) -> io::Result<Arc<[u8]>> {
        let item = &self.items[n as usize];
        let (kind, content) = self.packs[item.pack].resolve(item.at, &self.cache)?;
        let oid = self.oid(n);
        if kind != item.kind || Oid::of(kind, &content) != oid {
            return Err(bad(format!("the content of object {oid} does not match its id")));
        }
        Ok(content)
    }

    /// Compresses an object; `None` if it is stored completely and copying it is better.
    fn compress(&self, n: u32) -> io::Result<Option<Compressed>> {
        let item = &self.items[n as usize];
        let content = self.content(n)?;
        let is_complete = matches!(item.header.stored, Stored::Complete(_));
        let mut best: Option<Compressed> = None;
        if let Some(base) = item.base {
            let from = self.content(base)?;
            if let Some(delta) = delta::encode(&from, &content, content.len() / 2 + 32) {
                best = Some(Compressed {
                    base: Some(self.oid(base)),
                    size: delta.len() as u64,
                    zlib: compressed(&delta)?,
                });
            }
        }
        // If the delta is much smaller than the quickly compressed object, thorough compression cannot beat it.
        let clear = best.as_ref().is_some_and(|best| (best.zlib.len() as u64) < item.length / 3);
        if !clear && (!is_complete || self.fresh[item.pack]) {
            let complete = Compressed { base: None, size: content.len() as u64, zlib: compressed(&content)? };
            if best.as_ref().is_none_or(|best| best.zlib.len() + 4 >= complete.zlib.len()) {
                best = Some(complete);
            }
        }
        let must = !is_complete || (self.fresh[item.pack] && item.header.size <= ALWAYS_COMPRESSED);
        Ok(best.filter(|best| must || (best.zlib.len() as u64) < item.length))
    }

    /// Reads every object back from the new pack.
    fn check(
        &self,
        finished: &FinishedPack,
        dir: &Path,
        before: u64,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let failed = |error| HistoryError::io("read back the pack in", dir)(error);
        let index = PackIndex::load(dir, &finished.name).map_err(failed)?;
        let new = PackReader::open(dir, Arc::new(index)).map_err(failed)?;
        new.check(|| cancel.load(Ordering::Relaxed)).map_err(failed)?;
        let layout = new.index.layout().map_err(failed)?;
        if layout.len() != self.items.len() {
            return Err(failed(bad("objects are missing in the new pack".to_owned())));
        }
        for (done, (at, n)) in layout.into_iter().enumerate() {
            if cancel.load(Ordering::Relaxed) {
                return Err(HistoryError::Cancelled);
            }
            let oid = new.index.oid(n as usize).unwrap_or(Oid::from_raw([0; 20]));
            let item = self.needed.number(&oid).and_then(|node| self.by_node.get(&node));
            let item = item.map(|item| &self.items[*item as usize]);
            let item = item.ok_or_else(|| failed(bad(format!("unexpected object {oid} in the new pack"))))?;
            verify_object_at(&new, at, item.kind, &oid, &self.cache).map_err(failed)?;
            if done % 256 == 0 {
                progress(StoreProgress { phase: StorePhase::Verify, done: before + done as u64, total: 2 * before });
            }
        }
        self.cache.clear();
        Ok(())
    }
}

struct Compressed {
    base: Option<Oid>,
    size: u64,
    zlib: Vec<u8>,
}

fn name(reader: &PackReader) -> &Path {
    Path::new(&reader.index.name)
}

fn compressed(content: &[u8]) -> io::Result<Vec<u8>> {
    let mut zlib = Vec::new();
    deflate(content, Effort::Thorough, &mut zlib)?;
    Ok(zlib)
}

/// Verifies the id of the object at an offset; complete objects are streamed.
pub(crate) fn verify_object_at(
    reader: &PackReader,
    at: u64,
    kind: ObjectKind,
    oid: &Oid,
    cache: &ContentCache,
) -> io::Result<()> {
    let header = reader.header(at)?;
    let (found, sum) = match header.stored {
        Stored::Complete(found) => {
            let mut hasher = ObjectHasher::new(found, header.size);
            let mut content = reader.inflate(at, &header);
            let mut buffer = vec![0; header.size.clamp(1, 64 << 10) as usize];
            loop {
                match io::Read::read(&mut content, &mut buffer)? {
                    0 => break (found, hasher.finish()),
                    n => hasher.update(&buffer[..n]),
                }
            }
        }
        Stored::DeltaAt(_) | Stored::DeltaTo(_) => {
            let (found, content) = reader.resolve(at, cache)?;
            (found, Oid::of(found, &content))
        }
    };
    if found == kind && sum == *oid {
        Ok(())
    } else {
        Err(bad(format!("the content of object {oid} does not match its id")))
    }
}
