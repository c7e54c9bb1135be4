//! File systems of a test's own: small ones that fill up or can no longer be written to, and one that loses what was
//! not flushed.
//!
//! They are mounted, which takes root. Each goes with its owner, also when somebody still has files in it open.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

/// The file that takes the space; no part of a project's files.
const BALLAST: &str = "ballast";

/// What the state directory lies on.
#[derive(Debug, Default)]
pub(crate) enum Medium {
    /// What everything lies on.
    #[default]
    Shared,
    /// A small file system of its own in memory, of this size.
    Small(String),
    /// A file system in a file.
    File,
}

/// Enough for a consolidation, which leaves 64 MiB free; what is not written takes no space.
const DISK_BYTES: u64 = 192 << 20;

impl Medium {
    /// Mounts what has to be mounted on the directory.
    pub(crate) fn mount(&self, state: &Path) -> Option<Disk> {
        match self {
            Self::Shared => None,
            Self::Small(size) => Some(Disk::in_memory(state, size)),
            Self::File => Some(Disk::in_file(state, state.with_extension("disk"), DISK_BYTES)),
        }
    }
}

/// A file system that is mounted on a directory.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// Mounts an empty one in memory; the size is written as tmpfs wants it, for instance `24m`.
    ///
    /// # Panics
    /// When it cannot be mounted, as everywhere here: a test cannot go on then.
    pub fn in_memory(path: impl Into<PathBuf>, size: &str) -> Self {
        let path = path.into();
        let options = format!("size={size},mode=0700");
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).expect("mount");
        Self { path, image: None }
    }

    /// Makes and mounts an empty one in a file. What is not flushed stays out of that file for minutes.
    pub fn in_file(path: impl Into<PathBuf>, image: impl Into<PathBuf>, bytes: u64) -> Self {
        let (path, image) = (path.into(), image.into());
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("make the file of the disk");
        // No lazy initialisation: it would write in the background.
        run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&image));
        let disk = Self { path, image: Some(image) };
        disk.attach();
        disk
    }

    fn attach(&self) {
        let image = self.image.as_ref().expect("it lies in a file");
        run(Command::new("mount").args(["-o", "loop,commit=300"]).arg(image).arg(&self.path));
    }

    /// Fills it, all but so many bytes.
    pub fn fill(&self, leave: u64) {
        self.relieve();
        let free = statvfs(&self.path).expect("look for free space");
        let bytes = (free.blocks_available() * free.fragment_size()).saturating_sub(leave);
        let ballast = File::create(self.path.join(BALLAST)).expect("make the ballast");
        let bytes = i64::try_from(bytes).expect("it is small");
        // Somebody may write meanwhile: then it is as full as it can be.
        let filled = if bytes > 0 { nix::fcntl::posix_fallocate(&ballast, 0, bytes) } else { Ok(()) };
        assert!(matches!(filled, Ok(()) | Err(nix::errno::Errno::ENOSPC)), "fill the disk: {filled:?}");
    }

    /// Takes the filling out again.
    pub fn relieve(&self) {
        // There may be none.
        fs::remove_file(self.path.join(BALLAST)).ok();
    }

    /// Loses the power: what was not flushed at this instant is gone, and the disk is mounted as the next start finds it.
    /// Whoever writes to it has to stand still or be gone.
    ///
    /// # Panics
    /// When it does not lie in a file.
    pub fn lose_power(&mut self) {
        let image = self.image.clone().expect("it lies in a file");
        let cut = image.with_extension("cut");
        run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&cut));
        self.detach();
        fs::rename(&cut, &image).expect("put the disk as it was in its place");
        self.attach();
    }

    fn detach(&self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("unmount");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Makes a directory read-only for everybody who opens anything in it from now on, for as long as this lives.
#[derive(Debug)]
pub struct ReadOnly {
    path: PathBuf,
}

impl ReadOnly {
    /// Covers the directory with itself, read-only.
    ///
    /// # Panics
    /// When that cannot be mounted.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let bind = MsFlags::MS_BIND;
        mount(Some(&path), &path, None::<&str>, bind, None::<&str>).expect("cover the directory");
        let read_only = Self { path };
        let flags = bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &read_only.path, None::<&str>, flags, None::<&str>).expect("make it read-only");
        read_only
    }

    /// Returns the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        umount2(&self.path, MntFlags::MNT_DETACH).expect("uncover the directory");
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
