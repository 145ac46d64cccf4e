// the contents beside a page begin where the page stands in them
addEventListener("DOMContentLoaded", () => {
  const list = document.querySelector(".sidebar-scroll"), here = document.querySelector(".sidebar-tree .current-page > a");
  if (list && here) list.scrollTop += here.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 2;
});

// a film strip is small on a phone: a click opens it by itself
addEventListener("click", (event) => {
  if (event.target.matches("article img:not(a img, [src^='data:'])")) location.assign(event.target.src);
});
