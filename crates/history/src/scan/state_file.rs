//! Saves the workspace state to the disk, so that a new daemon does not read every file again.
//!
//! The file only saves time: if it is missing, damaged or of another version it is ignored, and the next
//! snapshot is a full scan. It may be older than the newest checkpoint; later changes show in the fingerprints.
//!
//! Format: a line with the version; the commit of the state; a JSON text, with its length, that holds the rules
//! and the other small fields; the directories, depth first, in fixed fields in little-endian order; the SHA-1
//! of everything before.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::rules::coverage::Rules;
use crate::scan::workspace_state::{
    Child, DirProperties, DirState, FileState, Node, ScanRemarks, WorkspaceState, total,
};
use crate::store::oid::Oid;
use crate::tree::confined_dir::Time;
use crate::tree::fingerprint::{FileFingerprint, RuleSource};
use crate::tree::names::RelPath;
use crate::tree::skipped::SkipReason;
use crate::tree::xattrs::Xattrs;

const HEADER: &[u8] = b"fermata workspace state 3\n";

/// More nested directories than a path can have names.
const MAX_DEPTH: u32 = 4096;

/// The kinds of special files, by their number in the file.
const SPECIAL: [&str; 5] = ["fifo", "socket", "character_device", "block_device", "unknown"];
const REASONS: [SkipReason; 5] =
    [SkipReason::TooLarge, SkipReason::Unreadable, SkipReason::Special, SkipReason::Unsteady, SkipReason::Reserved];

#[derive(Serialize, Deserialize)]
struct Small {
    rules: Rules,
    above: Vec<RuleSource>,
    nested: Vec<RuleSource>,
    mounts: Vec<String>,
    indexes: Vec<RuleSource>,
    forced: BTreeSet<RelPath>,
    notes: Vec<String>,
}

/// Reads a workspace state; `None` if there is none or the file cannot be trusted.
pub(crate) fn load(path: &Path) -> Option<WorkspaceState> {
    let bytes = fs::read(path).ok()?;
    let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(20)?)?;
    if <[u8; 20]>::from(Sha1::digest(body)) != checksum {
        return None;
    }
    let mut reader = StateReader(body.strip_prefix(HEADER)?);
    let commit = reader.oid()?;
    let small: Small = serde_json::from_slice(reader.counted()?).ok()?;
    let root = Arc::new(reader.dir(0)?);
    reader.0.is_empty().then_some(WorkspaceState {
        commit,
        rules: small.rules,
        above: small.above,
        nested: small.nested,
        mounts: small.mounts,
        indexes: small.indexes,
        forced: Arc::new(small.forced),
        notes: small.notes,
        root,
    })
}

/// Writes a workspace state to a new file. The file is not flushed: an incomplete one fails its checksum.
pub(crate) fn save(state: &WorkspaceState, path: &Path) -> io::Result<()> {
    let mut out = StateWriter(Vec::with_capacity(HEADER.len() + state.root.totals.files as usize * 128));
    out.0.extend_from_slice(HEADER);
    out.0.extend_from_slice(state.commit.raw());
    let small = Small {
        rules: state.rules.clone(),
        above: state.above.clone(),
        nested: state.nested.clone(),
        mounts: state.mounts.clone(),
        indexes: state.indexes.clone(),
        forced: BTreeSet::clone(&state.forced),
        notes: state.notes.clone(),
    };
    out.counted(&serde_json::to_vec(&small)?);
    out.dir(&state.root);
    let checksum: [u8; 20] = Sha1::digest(&out.0).into();
    out.0.extend_from_slice(&checksum);
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(&out.0)
}

struct StateWriter(Vec<u8>);

impl StateWriter {
    fn counted(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.0.extend_from_slice(bytes);
    }

    fn fingerprint(&mut self, fingerprint: &FileFingerprint) {
        [fingerprint.dev, fingerprint.ino, fingerprint.size]
            .iter()
            .for_each(|n| self.0.extend_from_slice(&n.to_le_bytes()));
        self.0.extend_from_slice(&fingerprint.mode.to_le_bytes());
        for time in [fingerprint.mtime, fingerprint.ctime] {
            self.0.extend_from_slice(&time.sec.to_le_bytes());
            self.0.extend_from_slice(&time.nsec.to_le_bytes());
        }
    }

    fn flags(&mut self, flags: &[bool]) {
        self.0.push(flags.iter().rev().fold(0, |byte, flag| byte << 1 | u8::from(*flag)));
    }

    fn xattrs(&mut self, xattrs: &Xattrs) {
        self.0.extend_from_slice(&(xattrs.len() as u32).to_le_bytes());
        for (name, value) in xattrs {
            self.counted(name);
            self.counted(value);
        }
    }

    fn dir(&mut self, dir: &DirState) {
        let DirProperties { fingerprint, xattrs, covered, settled, unreadable, ignore_file, ignore_settled, nested } =
            &dir.properties;
        self.fingerprint(fingerprint);
        let (listed, ignoring, filled) = (unreadable.is_none(), ignore_file.is_some(), dir.files.is_some());
        self.flags(&[*covered, *settled, *nested, listed, ignoring, filled, *ignore_settled]);
        self.xattrs(xattrs);
        if let Some(reason) = unreadable {
            self.counted(reason.as_bytes());
        }
        ignore_file.iter().for_each(|fingerprint| self.fingerprint(fingerprint));
        dir.files.iter().for_each(|oid| self.0.extend_from_slice(oid.raw()));
        self.0.extend_from_slice(dir.meta.raw());
        self.0.extend_from_slice(&(dir.children.len() as u32).to_le_bytes());
        for child in &dir.children {
            self.counted(&child.name);
            self.node(&child.node);
        }
    }

    fn node(&mut self, node: &Node) {
        match node {
            Node::File(file) => {
                self.0.push(0);
                self.fingerprint(&file.fingerprint);
                self.0.extend_from_slice(file.oid.raw());
                self.0.extend_from_slice(&file.size.to_le_bytes());
                let ScanRemarks { torn, sparse, forced, linked, doubtful } = file.remarks;
                self.flags(&[torn, sparse, forced, linked, doubtful]);
                self.xattrs(&file.xattrs);
            }
            Node::Dir(dir) => {
                self.0.push(1);
                self.dir(dir);
            }
            Node::Special { fingerprint, kind } => {
                self.0.push(2);
                self.fingerprint(fingerprint);
                self.0.push(SPECIAL.iter().position(|entry| entry == kind).unwrap_or(SPECIAL.len() - 1) as u8);
            }
            Node::Skipped { reason, detail } => {
                self.0.push(3);
                self.0.push(REASONS.iter().position(|entry| entry == reason).unwrap_or(0) as u8);
                self.counted(detail.as_bytes());
            }
            Node::StagedFile => self.0.push(4),
        }
    }
}

struct StateReader<'a>(&'a [u8]);

impl<'a> StateReader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn counted(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()? as usize;
        self.take(n)
    }

    fn text(&mut self) -> Option<Box<str>> {
        std::str::from_utf8(self.counted()?).ok().map(Into::into)
    }

    fn oid(&mut self) -> Option<Oid> {
        Some(Oid::from_raw(self.take(20)?.try_into().ok()?))
    }

    fn time(&mut self) -> Option<Time> {
        let sec = self.u64()? as i64;
        Some(Time { sec, nsec: self.u32()? })
    }

    fn fingerprint(&mut self) -> Option<FileFingerprint> {
        Some(FileFingerprint {
            dev: self.u64()?,
            ino: self.u64()?,
            size: self.u64()?,
            mode: self.u32()?,
            mtime: self.time()?,
            ctime: self.time()?,
        })
    }

    fn flags<const N: usize>(&mut self) -> Option<[bool; N]> {
        let byte = self.byte()?;
        Some(std::array::from_fn(|n| byte >> n & 1 == 1))
    }

    fn xattrs(&mut self) -> Option<Xattrs> {
        (0..self.u32()?).map(|_| Some((self.counted()?.into(), self.counted()?.into()))).collect()
    }

    fn dir(&mut self, depth: u32) -> Option<DirState> {
        if depth > MAX_DEPTH {
            return None;
        }
        let fingerprint = self.fingerprint()?;
        let [covered, settled, nested, listed, ignoring, filled, ignore_settled] = self.flags()?;
        let xattrs = self.xattrs()?;
        let unreadable = if listed { None } else { Some(self.text()?) };
        let ignore_file = if ignoring { Some(self.fingerprint()?) } else { None };
        let files = if filled { Some(self.oid()?) } else { None };
        let meta = self.oid()?;
        let children = (0..self.u32()?).map(|_| {
            let name = self.counted()?.into();
            Some(Arc::new(Child { name, node: self.node(depth)? }))
        });
        let children: Box<[Arc<Child>]> = children.collect::<Option<_>>()?;
        let totals = total(&children);
        let properties =
            DirProperties { fingerprint, xattrs, covered, settled, unreadable, ignore_file, ignore_settled, nested };
        Some(DirState { properties, children, totals, files, meta })
    }

    fn node(&mut self, depth: u32) -> Option<Node> {
        Some(match self.byte()? {
            0 => {
                let (fingerprint, oid, size) = (self.fingerprint()?, self.oid()?, self.u64()?);
                let [torn, sparse, forced, linked, doubtful] = self.flags()?;
                let remarks = ScanRemarks { torn, sparse, forced, linked, doubtful };
                Node::File(FileState { fingerprint, oid, size, remarks, xattrs: self.xattrs()? })
            }
            1 => Node::Dir(Arc::new(self.dir(depth + 1)?)),
            2 => Node::Special { fingerprint: self.fingerprint()?, kind: SPECIAL.get(self.byte()? as usize).copied()? },
            3 => {
                let reason = REASONS.get(self.byte()? as usize).copied()?;
                Node::Skipped { reason, detail: self.text()? }
            }
            4 => Node::StagedFile,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(sec: i64) -> FileFingerprint {
        let time = Time { sec, nsec: 7 };
        FileFingerprint { dev: 1, ino: 2, size: 3, mode: 0o100644, mtime: time, ctime: time }
    }

    fn workspace_state() -> WorkspaceState {
        let oid = Oid::from_raw([9; 20]);
        let remarks = ScanRemarks { sparse: true, linked: true, ..ScanRemarks::default() };
        let xattrs: Xattrs = Box::new([((*b"user.a").into(), (*b"\0").into())]);
        let child = |name: &[u8], node| Arc::new(Child { name: name.into(), node });
        let dir = |children: Box<[Arc<Child>]>, unreadable: Option<&str>| DirState {
            properties: DirProperties {
                fingerprint: fingerprint(-5),
                xattrs: xattrs.clone(),
                covered: true,
                settled: true,
                unreadable: unreadable.map(Into::into),
                ignore_file: Some(fingerprint(1)),
                ignore_settled: true,
                nested: false,
            },
            totals: total(&children),
            children,
            files: Some(oid),
            meta: oid,
        };
        let children = [
            child(
                b"a\xff\n",
                Node::File(FileState { fingerprint: fingerprint(100), oid, size: 5, remarks, xattrs: xattrs.clone() }),
            ),
            child(b"b", Node::Dir(Arc::new(dir(Box::default(), Some("closed"))))),
            child(b"c", Node::Special { fingerprint: fingerprint(3), kind: "socket" }),
            child(b"d", Node::Skipped { reason: SkipReason::Unsteady, detail: "it changed".into() }),
            child(b"e", Node::StagedFile),
        ];
        WorkspaceState {
            commit: oid,
            rules: Rules::default(),
            above: vec![("/a/.gitignore".into(), None), ("/b".into(), Some(fingerprint(8)))],
            nested: vec![("/c".into(), None)],
            mounts: vec!["/d ext4".to_owned()],
            indexes: vec![("/w/.git/index".into(), Some(fingerprint(9))), ("/w/m/.git".into(), None)],
            forced: Arc::new([RelPath::new("x/y").unwrap()].into()),
            notes: vec!["a note".to_owned()],
            root: Arc::new(dir(children.into(), None)),
        }
    }

    #[test]
    fn a_saved_state_is_read_back_and_a_damaged_one_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cache");
        let state = workspace_state();
        save(&state, &file).unwrap();
        let read = load(&file).unwrap();
        assert_eq!(format!("{state:?}"), format!("{read:?}"));

        let bytes = fs::read(&file).unwrap();
        for at in [0, HEADER.len() + 3, bytes.len() / 2, bytes.len() - 1] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            fs::write(dir.path().join("bad"), &bad).unwrap();
            assert!(load(&dir.path().join("bad")).is_none(), "byte {at}");
        }
        for length in [0, 15, bytes.len() / 2, bytes.len() - 1] {
            fs::write(dir.path().join("short"), &bytes[..length]).unwrap();
            assert!(load(&dir.path().join("short")).is_none(), "{length} bytes");
        }
    }
}
