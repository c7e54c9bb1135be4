//! Finds the `fermata.toml` of a workspace and reads it if it can be trusted: it names commands to run.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::errors::{CommandError, Exit};
use crate::paths::canonical;

pub const FILE_NAME: &str = "fermata.toml";

/// Larger files are refused.
const MAX_BYTES: u64 = 1 << 20;

/// A `fermata.toml` that was found and read.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceFile {
    /// The absolute path.
    pub file: PathBuf,
    /// The directory of the file.
    pub workspace: PathBuf,
    pub text: String,
}

/// Why a file was not read.
#[derive(Debug)]
pub struct FileRefusal {
    pub message: String,
    pub hint: Option<String>,
    missing: bool,
}

impl FileRefusal {
    fn new(message: String) -> Self {
        Self { message, hint: None, missing: false }
    }
}

/// Reads the given file, or the nearest one in `here` and the directories above it.
///
/// # Errors
/// When there is none, or it cannot be trusted or read.
pub fn find(given: Option<&Path>, here: &Path, home: Option<&Path>) -> Result<SourceFile, CommandError> {
    let file = match given {
        Some(file) => file.to_owned(),
        None => nearest(here, home).ok_or_else(|| {
            CommandError::new(
                Exit::NotFound,
                "file_not_found",
                format!("there is no {FILE_NAME} in {} or above it", here.display()),
            )
            .hint("change to the workspace, or give the file with --file")
        })?,
    };
    let text = read_trusted(&file).map_err(|refusal| {
        let exit = if refusal.missing { Exit::NotFound } else { Exit::Usage };
        let code = if refusal.missing { "file_not_found" } else { "file_refused" };
        let error = CommandError::new(exit, code, refusal.message);
        match refusal.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })?;
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let workspace = canonical(directory)?;
    let file = workspace.join(file.file_name().unwrap_or_default());
    Ok(SourceFile { file, workspace, text })
}

/// Searches a directory and those above it, but not above `home`.
fn nearest(here: &Path, home: Option<&Path>) -> Option<PathBuf> {
    for directory in here.ancestors() {
        let file = directory.join(FILE_NAME);
        if file.symlink_metadata().is_ok() {
            return Some(file);
        }
        if Some(directory) == home {
            break;
        }
    }
    None
}

/// Reads a text file that belongs to the caller or root and is not writable by others.
///
/// # Errors
/// When the file is missing, not trusted, too large, or not UTF-8.
pub fn read_trusted(path: &Path) -> Result<String, FileRefusal> {
    let shown = path.display();
    let failed = |error: std::io::Error| FileRefusal {
        missing: error.kind() == std::io::ErrorKind::NotFound,
        ..FileRefusal::new(match error.kind() {
            std::io::ErrorKind::NotFound => format!("there is no file {shown}"),
            _ => format!("failed to read {shown}: {error}"),
        })
    };
    // Opening a FIFO would block otherwise.
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    check(path, &file)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileRefusal::new(format!("{shown} is larger than {} KiB", MAX_BYTES >> 10)));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
        FileRefusal::new(format!("{shown} is not valid UTF-8; the first invalid byte is on line {line}"))
    })
}

fn check(path: &Path, file: &File) -> Result<(), FileRefusal> {
    let shown = path.display();
    let metadata = file.metadata().map_err(|e| FileRefusal::new(format!("failed to stat {shown}: {e}")))?;
    if !metadata.is_file() {
        return Err(FileRefusal::new(format!("{shown} is not a regular file")));
    }
    let me = nix::unistd::geteuid().as_raw();
    if metadata.uid() != me && metadata.uid() != 0 {
        return Err(FileRefusal {
            hint: Some(format!("review the file, then take ownership: chown {me} {shown}")),
            ..FileRefusal::new(format!(
                "{shown} belongs to another user (uid {}); its commands would run as you",
                metadata.uid()
            ))
        });
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(FileRefusal {
            hint: Some(format!("chmod go-w {shown}")),
            ..FileRefusal::new(format!(
                "{shown} is writable by other users (mode {:04o}); its commands would run as you",
                metadata.mode() & 0o7777
            ))
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn write(path: &Path, mode: u32) {
        fs::write(path, "# nothing\n").expect("write a file");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }

    fn message(error: CommandError) -> String {
        match error {
            CommandError::Reported(report) => format!("{} {}", report.exit.number(), report.message),
            CommandError::OutputClosed => panic!("not reported"),
        }
    }

    #[test]
    fn the_nearest_file_on_the_way_up_is_found_but_none_above_home() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().canonicalize().expect("it is there");
        let deep = root.join("home/ws/deep/er");
        fs::create_dir_all(&deep).expect("directories");
        let home = root.join("home");
        write(&root.join(FILE_NAME), 0o644);
        assert!(message(find(None, &deep, Some(&home)).expect_err("only above home")).starts_with("3 there is no"));
        assert_eq!(find(None, &deep, None).expect("found").workspace, root);
        write(&home.join("ws").join(FILE_NAME), 0o600);
        let found = find(None, &deep, Some(&home)).expect("found");
        assert_eq!((found.file, found.workspace), (home.join("ws").join(FILE_NAME), home.join("ws")));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused_and_so_is_what_is_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE_NAME);
        for mode in [0o664, 0o646, 0o666] {
            write(&file, mode);
            let text = message(find(Some(&file), dir.path(), None).expect_err("others can write it"));
            assert!(text.contains("writable by other users") && text.contains(&format!("{mode:04o}")), "{text}");
        }
        write(&file, 0o644);
        assert!(find(Some(&file), dir.path(), None).is_ok());
        fs::remove_file(&file).expect("remove it");
        assert!(message(find(Some(&file), dir.path(), None).expect_err("gone")).starts_with("3 there is no file"));
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a pipe");
        assert!(message(find(Some(&file), dir.path(), None).expect_err("a pipe")).contains("not a regular file"));
        fs::remove_file(&file).expect("remove it");
        fs::create_dir(&file).expect("a directory");
        assert!(message(find(Some(&file), dir.path(), None).expect_err("a directory")).contains("not a regular file"));
    }

    #[test]
    fn a_file_that_is_no_text_or_too_large_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE_NAME);
        fs::write(&file, b"a = 1\nb = \"\xff\"\n").expect("write");
        assert!(message(find(Some(&file), dir.path(), None).expect_err("not UTF-8")).contains("line 2"));
        fs::write(&file, vec![b'#'; (MAX_BYTES + 1) as usize]).expect("write");
        assert!(message(find(Some(&file), dir.path(), None).expect_err("large")).contains("larger than 1024 KiB"));
        if nix::unistd::geteuid().is_root() {
            write(&file, 0o644);
            std::os::unix::fs::chown(&file, Some(65_534), None).expect("chown");
            assert!(message(find(Some(&file), dir.path(), None).expect_err("another's")).contains("another user"));
        }
    }
}
