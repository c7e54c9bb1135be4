//! Forged checkpoints are refused on import.

use super::*;
use crate::errors::Result;
use crate::store::oid::ObjectKind;
use crate::store::pack::{PackWriter, Packed};
use crate::store::pack_index::{self, IndexLine, PackIndex};
use crate::tree::listing::CheckpointRoot;
use crate::tree::metadata::{self, MetaKind, MetaLine};
use crate::tree::trees::{MODE_LINK, MODE_TREE, TreeEntry, encode_tree};

/// A pack with arbitrary objects.
struct Forge {
    dir: tempfile::TempDir,
    pack: PackWriter,
}

impl Forge {
    fn new() -> Forge {
        let dir = tempfile::tempdir().unwrap();
        let pack = PackWriter::create(dir.path()).unwrap();
        Forge { dir, pack }
    }

    fn object(&mut self, kind: ObjectKind, content: &[u8]) -> Oid {
        let oid = Oid::of(kind, content);
        self.pack.append(&Packed::new(oid, kind, content).unwrap()).unwrap();
        oid
    }

    fn tree(&mut self, entries: Vec<(&str, u32, Oid)>) -> Oid {
        let one = |(name, mode, oid): (&str, u32, Oid)| TreeEntry { name: name.as_bytes().to_vec(), mode, oid };
        let entries: Vec<_> = entries.into_iter().map(one).collect();
        self.object(ObjectKind::Tree, &encode_tree(&entries))
    }

    /// Adds the metadata of a directory with some links in it.
    fn described(&mut self, links: &[&str]) -> Oid {
        let line = |kind, name: &str| MetaLine {
            kind,
            mode: 0o755,
            mtime: Default::default(),
            size: 0,
            xattrs: Vec::new().into(),
            name: name.as_bytes().to_vec().into(),
        };
        let mut lines = vec![line(MetaKind::Itself, "")];
        lines.extend(links.iter().map(|name| line(MetaKind::Link, name)));
        self.object(ObjectKind::Blob, metadata::encode(lines.len(), lines).as_bytes())
    }

    /// Builds a checkpoint of it and lets a store verify it.
    fn received(mut self, sandbox: &Sandbox, files: Oid, meta: Oid) -> Result<()> {
        let manifest = CheckpointRoot::read(&sandbox.history.objects, &sandbox.history.refs.get(1).unwrap()).unwrap();
        let manifest = sandbox.history.objects.read(&manifest.manifest, ObjectKind::Blob).unwrap();
        let manifest = self.object(ObjectKind::Blob, &manifest);
        let root =
            self.tree(vec![("files", MODE_TREE, files), ("meta", MODE_TREE, meta), ("manifest", 0o100_644, manifest)]);
        let commit = self.object(ObjectKind::Commit, format!("tree {root}\n\nmade up\n").as_bytes());
        let finished = self.pack.finish().unwrap();
        let file = |end: &str| self.dir.path().join(format!("{}.{end}", finished.name));
        received(&sandbox.history, &file("pack"), &fs::read(file("idx")).unwrap(), commit)
    }
}

fn received(history: &History, pack: &Path, index: &[u8], commit: Oid) -> Result<()> {
    let incoming = history.receive(9).unwrap();
    fs::copy(pack, incoming.pack()).unwrap();
    fs::write(incoming.index(), index).unwrap();
    history.check_received(&incoming, commit, &quiet, &NEVER)
}

fn with_one() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.write("a", "1");
    sandbox.checkpoint(1);
    sandbox
}

#[track_caller]
fn refused(outcome: Result<()>, why: &str) {
    let text = fermata_protocol::error_chain(&outcome.unwrap_err());
    assert!(text.contains(why), "{text}");
}

#[test]
fn directories_that_are_equal_a_thousand_million_times_are_refused_at_once() {
    let sandbox = with_one();
    let bomb = |depth: u32, wide: usize| {
        let mut forge = Forge::new();
        let files = forge.tree(Vec::new());
        let entries = forge.described(&[]);
        let names: Vec<String> = (0..wide).map(|n| format!("d.{n}")).collect();
        let mut meta = forge.tree(vec![("entries", 0o100_644, entries)]);
        for _ in 0..depth {
            let mut below: Vec<_> = names.iter().map(|name| (name.as_str(), MODE_TREE, meta)).collect();
            below.push(("entries", 0o100_644, entries));
            meta = forge.tree(below);
        }
        forge.received(&sandbox, files, meta)
    };
    bomb(3, 10).unwrap();
    bomb(2000, 1).unwrap();
    refused(bomb(40, 10), "more than 10000000 paths");
    refused(bomb(3000, 1), "a path of more than 4095 bytes");
}

#[test]
fn invalid_link_targets_are_refused() {
    let sandbox = with_one();
    let link = |target: &[u8]| {
        let mut forge = Forge::new();
        let target = forge.object(ObjectKind::Blob, target);
        let files = forge.tree(vec![("l", MODE_LINK, target)]);
        let entries = forge.described(&["l"]);
        let meta = forge.tree(vec![("entries", 0o100_644, entries)]);
        forge.received(&sandbox, files, meta)
    };
    link(b"anywhere").unwrap();
    link(&[b'a'; 4095]).unwrap();
    for target in [&b""[..], b"a\0b", &[b'a'; 4096]] {
        refused(link(target), "it is not a valid target of a symbolic link");
    }
}

#[test]
fn an_index_that_does_not_match_its_pack_is_refused() {
    let sandbox = with_one();
    sandbox.write("a", "22");
    sandbox.checkpoint(2);
    let history = &sandbox.history;
    let exported = history.export(1, &quiet, &NEVER).unwrap();
    let name = exported.pack.file_stem().unwrap().to_str().unwrap();
    let index = PackIndex::load(exported.pack.parent().unwrap(), name).unwrap();
    let encoded = |change: &dyn Fn(usize, &mut IndexLine)| {
        let line = |n| {
            let mut line =
                IndexLine { oid: index.oid(n).unwrap(), crc: index.crc(n), offset: index.offset(n).unwrap() };
            change(n, &mut line);
            line
        };
        let mut lines: Vec<IndexLine> = (0..index.count()).map(line).collect();
        pack_index::encode(&mut lines, index.pack_checksum().try_into().unwrap())
    };
    let receive = |index: &[u8]| received(history, &exported.pack, index, exported.commit);
    receive(&encoded(&|_, _| {})).unwrap();
    refused(receive(&encoded(&|n, line| line.crc ^= u32::from(n == 0))), "does not match the pack index");

    // Sound but unneeded objects could replace others that were never hashed.
    let commit = exported.commit;
    drop(exported);
    history.consolidate(Extent::Everything, &quiet, &NEVER).unwrap();
    let both = fs::read_dir(history.repository().join("objects/pack")).unwrap().map(|entry| entry.unwrap().path());
    let both = both.filter(|path| path.extension() == Some(OsStr::new("pack"))).collect::<Vec<_>>();
    assert_eq!(both.len(), 1);
    let index = fs::read(both[0].with_extension("idx")).unwrap();
    refused(received(history, &both[0], &index, commit), "objects that the checkpoint does not need");
}

#[test]
fn objects_that_exceed_the_memory_limit_are_refused() {
    use crate::store::pack_reader::{ContentCache, PackReader};
    use std::sync::Arc;
    let mut forge = Forge::new();
    let base: Vec<u8> = (0..2000_u32).flat_map(|n| (n * n).to_le_bytes()).collect();
    let target = [&base[..], &base].concat();
    let base_oid = forge.object(ObjectKind::Blob, &base);
    let steps = crate::store::delta::encode(&base, &target, 1000).unwrap();
    assert_eq!(crate::store::delta::target_size(&steps).unwrap(), 16_000);
    let mut zlib = Vec::new();
    crate::store::deflate::deflate(&steps, crate::store::deflate::Effort::Fast, &mut zlib).unwrap();
    let oid = Oid::of(ObjectKind::Blob, &target);
    forge.pack.append_deflated(oid, ObjectKind::Blob, Some(&base_oid), steps.len() as u64, &zlib).unwrap();
    let finished = forge.pack.finish().unwrap();
    let index = Arc::new(PackIndex::load(forge.dir.path(), &finished.name).unwrap());
    let open = |limit| PackReader::open(forge.dir.path(), Arc::clone(&index)).unwrap().limited(limit);
    let read = |limit, oid: &Oid| open(limit).resolve(index.find(oid).unwrap(), &ContentCache::default()).map(drop);
    read(8000, &base_oid).unwrap();
    read(16_000, &oid).unwrap();
    assert!(read(7999, &base_oid).unwrap_err().to_string().contains("8000 bytes exceed the limit of 7999"));
    assert!(read(15_999, &oid).unwrap_err().to_string().contains("16000 bytes exceed the limit of 15999"));
}
